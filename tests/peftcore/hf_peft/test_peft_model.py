"""`peft.peft_model`: the classes that HF PEFT defines there, and the fields of its status."""

import dataclasses

import pytest
from peft import peft_model as of_peft
from signatures import arguments
from torch import nn

from peftcore import LoraConfig, get_peft_model
from peftcore.hf_peft import peft_model

TASKS = [name for name in peft_model.__all__ if name.startswith("PeftModelFor")]


def test_peft_has_each_name_there() -> None:
    assert not [name for name in peft_model.__all__ if not hasattr(of_peft, name)]
    assert {name for name in vars(of_peft) if name.startswith("PeftModelFor")} == set(TASKS)


@pytest.mark.parametrize("name", ["TunerLayerStatus", "TunerModelStatus"])
def test_the_status_has_pefts_fields(name: str) -> None:
    ours, theirs = ([field.name for field in dataclasses.fields(getattr(m, name))] for m in (peft_model, of_peft))
    assert set(theirs) <= set(ours)


@pytest.mark.parametrize("name", ["get_layer_status", "get_model_status"])
def test_the_arguments_are_those_of_peft(name: str) -> None:
    assert arguments(getattr(peft_model, name)) == arguments(getattr(of_peft, name))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_class_makes_a_model_of_its_task_alone(name: str) -> None:
    kind = getattr(peft_model, name)
    model = kind(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert [other for other in TASKS if isinstance(model, getattr(peft_model, other))] == [name]
    assert isinstance(model, peft_model.PeftModel)
    without_task = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert not isinstance(without_task, kind)
