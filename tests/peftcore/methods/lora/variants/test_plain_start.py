"""LoRA's own start values: one factor random, the other zero."""

import math

import pytest
import torch
from lora_nets import adapter, lora
from torch import nn


def test_the_default_start_is_uniform_by_kaimings_rule_and_b_is_zero() -> None:
    """Kaiming's bound with a = √5 is 1/√i, so the standard deviation is 1/√(3 i)."""
    torch.manual_seed(0)
    one = adapter(lora(nn.Sequential(nn.Linear(4000, 8)), r=4))
    assert not one.lora_B_weight.any()
    assert one.lora_A_weight.abs().max() <= 1 / math.sqrt(4000)
    assert one.lora_A_weight.std().item() == pytest.approx(1 / math.sqrt(3 * 4000), rel=0.05)


def test_the_gaussian_start_has_a_standard_deviation_of_one_over_the_rank() -> None:
    torch.manual_seed(0)
    one = adapter(lora(nn.Sequential(nn.Linear(4000, 8)), r=4, init_lora_weights="gaussian"))
    assert not one.lora_B_weight.any()
    assert one.lora_A_weight.std().item() == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_on_an_embedding_a_is_zero_and_b_standard_normal(start: bool | str) -> None:
    torch.manual_seed(0)
    one = adapter(lora(nn.Sequential(nn.Embedding(50, 800)), r=4, init_lora_weights=start))
    assert not one.lora_A_weight.any()
    assert one.lora_B_weight.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("layer", [nn.Linear(400, 400), nn.Embedding(400, 400)], ids=["linear", "embedding"])
def test_the_start_for_tests_has_no_factor_of_zero(layer: nn.Module) -> None:
    """Both factors keep the default values of `nn.Linear` or `nn.Embedding`."""
    torch.manual_seed(0)
    one = adapter(lora(nn.Sequential(layer), r=4, init_lora_weights=False))
    zero_by_default = one.lora_A_weight if isinstance(layer, nn.Embedding) else one.lora_B_weight
    deviation = 1.0 if isinstance(layer, nn.Embedding) else 1 / math.sqrt(3 * 4)
    assert zero_by_default.std().item() == pytest.approx(deviation, rel=0.1)
    assert one.delta_weight().any()
