"""`get_layer_status` and `get_model_status`, compared with HF PEFT's."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftcore
from peftcore import LoraConfig, PeftError, get_layer_status, get_model_status, get_peft_model


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """A model with two adapters, of which the first is active, in both libraries."""
    models = []
    for library in (peftcore, peft):
        model = library.get_peft_model(base(), library.LoraConfig(r=2, target_modules=["0", "2"]))
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["0"]))
        models.append(model)
    return models[0], models[1]


SAME = ("num_adapter_layers", "enabled", "active_adapters", "merged_adapters", "available_adapters", "devices")


def test_a_model_has_the_status_that_peft_gives_it(pair: tuple[Any, Any]) -> None:
    for change in (
        lambda model: None,
        lambda model: model.merge_adapter(["default"]),
        lambda model: model.unmerge_adapter(),
        lambda model: model.set_adapter("other"),
    ):
        for model in pair:
            change(model)
        ours, theirs = (model.get_model_status() for model in pair)
        assert {name: getattr(ours, name) for name in SAME} == {name: getattr(theirs, name) for name in SAME}
        assert ours.peft_types == theirs.peft_types
        assert ours.adapter_model_type == theirs.adapter_model_type
    assert ours.requires_grad == theirs.requires_grad == {"default": False, "other": True}


def test_layers_have_the_paths_of_the_plain_model(pair: tuple[Any, Any]) -> None:
    ours, theirs = (model.get_layer_status() for model in pair)
    assert [status.name for status in ours] == [status.name.removeprefix("model.") for status in theirs]
    assert [status.available_adapters for status in ours] == [status.available_adapters for status in theirs]


def test_what_differs_between_parameters_is_irregular() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    model[0].lora_A["default"].weight.requires_grad_(False)
    assert get_model_status(model).requires_grad == {"default": "irregular"}


def test_disabled_adapters_are_not_enabled() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    model.disable_adapters()
    assert not get_layer_status(model)[0].enabled
    assert not model.has_active_enabled_adapter


def test_a_copy_of_a_whole_module_is_a_layer_too() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    assert [status.name for status in get_layer_status(model)] == ["0", "2"]


def test_a_plain_model_has_no_status() -> None:
    with pytest.raises(PeftError, match="no adapter layers"):
        get_layer_status(base())
