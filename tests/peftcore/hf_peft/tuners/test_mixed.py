"""The module of HF PEFT for models with adapters of several methods."""

import importlib

import peft.tuners.mixed.model as theirs
from torch import nn

import peftcore
from peftcore.hf_peft.tuners import mixed


def test_the_names_are_those_of_hf_peft() -> None:
    assert [method.value for method in mixed.COMPATIBLE_TUNER_TYPES] == [m.value for m in theirs.COMPATIBLE_TUNER_TYPES]
    assert mixed.PREFIXES == theirs.PREFIXES
    assert importlib.import_module("peftcore.tuners.mixed.model") is mixed


def test_the_view_on_a_mixed_model_is_of_its_class() -> None:
    model = peftcore.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peftcore.LoraConfig(target_modules=["0"]), mixed=True
    )
    model.add_adapter("other", peftcore.LoHaConfig(target_modules=["0"]))
    assert isinstance(model.base_model, mixed.MixedModel)
