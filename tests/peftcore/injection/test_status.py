"""`get_layer_status` and `get_model_status`, compared with HF PEFT's."""

import dataclasses
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import LoraConfig, TargetError, get_layer_status, get_model_status, get_peft_model


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


def test_a_model_that_keeps_its_class_has_no_adapter_model_as_in_peft() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
    for make, target in ((base, "0"), (lambda: LlamaForCausalLM(config), "q_proj")):
        of_both = [
            library.get_model_status(
                library.inject_adapter_in_model(library.LoraConfig(r=2, target_modules=[target]), make())
            )
            for library in (peftcore, peft)
        ]
        ours, theirs = (dataclasses.asdict(status) for status in of_both)
        assert ours["adapter_model_type"] == "None"
        assert ours == theirs


class Several(nn.Module):
    """A model with one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.conv, self.linear = nn.Linear(4, 4), nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.tokens, self.rows = nn.Embedding(8, 4), nn.Embedding(8, 4)


def several(library: Any) -> Any:
    config = library.LoraConfig(
        r=2,
        target_modules=["linear", "conv", "rows"],
        modules_to_save=["head"],
        trainable_token_indices={"tokens": [1]},
    )
    model = library.get_peft_model(Several(), config)
    model.add_adapter("other", library.LoraConfig(r=2, target_modules=["linear"]))
    model.set_adapter("other")
    return model


def test_each_layer_has_the_status_that_peft_gives_it() -> None:
    ours, theirs = (several(library).get_layer_status() for library in (peftcore, peft))
    assert [dataclasses.asdict(status) for status in ours] == [dataclasses.asdict(status) for status in theirs]


def test_without_a_peft_model_paths_are_those_of_the_plain_model() -> None:
    model = peftcore.inject_adapter_in_model(LoraConfig(r=2, target_modules=["2", "0"]), base())
    assert [status.name for status in get_layer_status(model)] == ["0", "2"]


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
    assert [status.name for status in get_layer_status(model)] == ["model.0", "model.2"]


def test_layers_that_were_switched_by_themselves_are_irregular() -> None:
    ours, theirs = (several(library) for library in (peftcore, peft))
    for model in (ours, theirs):
        model.base_model.model.linear.enable_adapters(False)
        model.base_model.model.head.set_adapter("default")
    assert ours.get_model_status().enabled == theirs.get_model_status().enabled == "irregular"
    assert ours.get_model_status().active_adapters == "irregular"
    enabled = [[status.enabled for status in model.get_layer_status()] for model in (ours, theirs)]
    assert enabled[0] == enabled[1]


def test_a_module_that_trains_whole_is_switched_by_itself_too() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    model[0].enable_adapters(False)
    assert [status.enabled for status in get_layer_status(model)] == [False, True]
    assert get_model_status(model).enabled == "irregular"
    model[2].enable_adapters(False)
    assert get_model_status(model).enabled is False and not model.has_active_enabled_adapter


def test_a_module_that_holds_a_model_with_adapters_has_its_status() -> None:
    results = []
    for library in (peftcore, peft):
        config = library.LoraConfig(r=2, target_modules=["0", "2"])
        plain = library.inject_adapter_in_model(config, base())
        holder = nn.ModuleList([plain, nn.Linear(2, 2), library.get_peft_model(base(), config)])
        model_status, layer_status = library.get_model_status(holder), library.get_layer_status(holder)
        names = (*SAME, "trainable_params", "total_params")
        results.append(({name: getattr(model_status, name) for name in names}, [one.name for one in layer_status]))
    assert results[0] == results[1]


def test_prompts_have_no_layers() -> None:
    config = peftcore.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=1, **sizes)), config)
    for status in (get_layer_status, get_model_status):
        with pytest.raises(TypeError, match=r"\['default'\] are prompts") as error:
            status(model)
        assert isinstance(error.value, TargetError)


def test_a_plain_model_has_no_status() -> None:
    with pytest.raises(TargetError, match="No adapter layers"):
        get_layer_status(base())
