"""Factors are exact, or the best of their rank, with a true error."""

from typing import Any

import pytest
import torch
from conversion_models import OTHERS, SHAPE, random_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftError,
    PromptTuningConfig,
)
from peftcore.conversion import add_as_lora
from peftcore.injection.adapter_set import adapter_set


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["q_proj", "v_proj"], r=6), OTHERS["loha"][0]])
def test_a_smaller_rank_is_the_best_there_is_and_its_error_is_told(config: PeftConfig) -> None:
    model = random_adapter(config)
    report = add_as_lora(model, "default", "plain", rank=2)
    layers: Any = adapter_set(model).adapters("plain")
    whole = missing = 0.0
    for path, adapter in adapter_set(model).adapters("default").items():
        delta, kept = adapter.delta_weight().detach(), layers[path].delta_weight().detach()
        best = torch.linalg.svdvals(delta.double())[2:].norm()
        assert (delta - kept).norm().item() == pytest.approx(best.item(), rel=1e-4)
        assert report.errors[path] == pytest.approx((best / delta.norm()).item(), rel=1e-4)
        whole, missing = whole + delta.square().sum().item(), missing + best.square().item()
    assert report.error == pytest.approx((missing / whole) ** 0.5, rel=1e-4)


def test_a_tolerance_gives_each_layer_the_least_rank_that_meets_it() -> None:
    model = random_adapter(LoHaConfig(target_modules="all-linear", r=3, init_weights=False))
    report = add_as_lora(model, "default", "plain", tolerance=0.2)
    layers: Any = adapter_set(model).adapters("plain")
    assert len(set(report.ranks.values())) > 1 and 0 < report.error <= 0.2
    for path, adapter in adapter_set(model).adapters("default").items():
        sigma = torch.linalg.svdvals(adapter.delta_weight().detach().double())
        missing = [sigma[rank:].norm() / sigma.norm() for rank in range(len(sigma) + 1)]
        least = next(rank for rank, error in enumerate(missing) if error <= 0.2)
        assert report.ranks[path] == layers[path].r == least


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "is a prompt"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]), "aLoRA acts at some positions only"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), "changes the layer.s bias too"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3 changes the layer's bias too"),
        (LNTuningConfig(target_modules=["norm"]), "is a norm, which plain LoRA does not change"),
        (LoHaConfig(target_modules=["q_proj"]), "give rank=16, or tolerance="),
    ],
)
def test_what_two_factors_cannot_be_is_refused_and_nothing_is_half_made(config: PeftConfig, match: str) -> None:
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = random_adapter(config, base)
    before = list(model.state_dict())
    limits = {} if isinstance(config, LoHaConfig) else {"rank": 4}
    with pytest.raises(PeftError, match=match):
        add_as_lora(model, "default", "plain", **limits)
    assert list(model.state_dict()) == before and list(model.peft_config) == ["default"]
