"""`peft.mixed_model`: a model with adapters of several methods."""

from torch import nn

from peftcore import IA3Config, LoraConfig, get_peft_model
from peftcore.hf_peft.mixed_model import PeftMixedModel


def test_a_model_becomes_mixed_with_a_second_method() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert not isinstance(model, PeftMixedModel)
    model.add_adapter("second", IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert isinstance(model, PeftMixedModel)


def test_its_call_makes_a_mixed_model() -> None:
    model = PeftMixedModel(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert isinstance(model, PeftMixedModel)
