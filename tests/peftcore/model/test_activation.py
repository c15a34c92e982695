"""Adapters are chosen, disabled and enabled, for the whole model and in a context."""

import copy
from typing import Any

import pytest
import torch
from two_adapters import logits

from peftcore import (
    AdapterNameError,
    LoraConfig,
    MergeError,
    PromptTuningConfig,
    get_peft_model,
)


def test_disabled_the_model_is_its_base_until_it_is_enabled(model: Any) -> None:
    adapted = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), base) and not torch.equal(base, adapted)
    assert model.active_adapters() == ["a"]
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)  # the end of the context does not enable
    assert torch.equal(logits(model, adapter_names="a"), adapted)  # what is asked for by name acts
    model.set_adapter("b")
    assert torch.equal(logits(model), base)
    model.set_adapter("a")
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)


def test_what_comes_while_disabled_does_not_act(model: Any) -> None:
    model.disable_adapters()
    base = logits(model)
    model.add_adapter("c", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["b", "c"])
    model.delete_adapter("a")
    assert torch.equal(logits(model), base)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), base)
    again.enable_adapters()
    assert not torch.equal(logits(again), base)
    plain = model.unload()
    assert torch.equal(logits(plain), base)


def test_prompts_are_disabled_too(model: Any) -> None:
    prompted = get_peft_model(model.unload(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    with prompted.disable_adapter():
        base = logits(prompted)
    prompted.disable_adapters()
    assert torch.equal(logits(prompted), base)


def test_merged_and_disabled_do_not_go_together(model: Any) -> None:
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter first"):
        model.disable_adapters()
    model.unmerge_adapter()
    model.disable_adapters()
    with pytest.raises(MergeError, match="enable_adapters first"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="enable_adapters first"):
        model.merge_and_unload()


def test_set_adapter_and_active_adapters(model: Any) -> None:
    model.set_adapter(["b", "a"])
    assert model.active_adapters() == ["b", "a"] == list(model.active_adapters)
    with pytest.raises(AdapterNameError, match="nothing"):
        model.set_adapter("nothing")
