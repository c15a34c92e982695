"""The decoding benchmark times adapters that are equal on all sides, and that do something."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from benchmarks.decoding import check_equal


def models(std: float, *seeds: int) -> dict[str, Any]:
    """Return the bare base, and a model for each seed whose adapter weights have this standard deviation."""
    found: dict[str, Any] = {}
    for side in ("base", *range(len(seeds))):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        model: Any = LlamaForCausalLM(config)
        if isinstance(side, int):
            model = peftcore.get_peft_model(model, peftcore.LoraConfig(r=2, target_modules="all-linear"))
            torch.manual_seed(seeds[side])
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=std)
        found[str(side)] = model.eval()
    return found


def test_equal_adapters_that_change_the_base_are_accepted() -> None:
    check_equal(models(0.5, 1, 1))


def test_adapters_that_differ_are_refused() -> None:
    with pytest.raises(SystemExit, match="differ by"):
        check_equal(models(0.5, 1, 2))


def test_adapters_that_do_nothing_are_refused() -> None:
    with pytest.raises(SystemExit, match="changes no layer"):
        check_equal(models(0.0, 1, 1))
