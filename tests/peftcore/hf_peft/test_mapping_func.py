"""`peft.mapping_func`: HF PEFT's arguments in their order."""

from peft import mapping_func as of_peft
from signatures import arguments
from torch import nn

from peftcore import LoraConfig, PeftModel
from peftcore.hf_peft import mapping_func


def test_the_arguments_are_those_of_peft() -> None:
    assert arguments(mapping_func.get_peft_model) == arguments(of_peft.get_peft_model)


def test_the_result_is_a_model_with_adapters() -> None:
    model = mapping_func.get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), "mine")
    assert isinstance(model, PeftModel) and list(model.peft_config) == ["mine"]
