"""rsLoRA: the scaling is α/√r."""

import math

import pytest
import torch
from lora_nets import adapter, lora, net_and_input
from torch import nn


@pytest.mark.parametrize("r", [1, 4, 16])
def test_the_scaling_is_alpha_over_the_root_of_the_rank(r: int) -> None:
    for rslora, scaling in ((False, 16 / r), (True, 16 / math.sqrt(r))):
        net = lora(nn.Sequential(nn.Linear(20, 20)), r=r, lora_alpha=16, use_rslora=rslora)
        assert adapter(net).scaling == pytest.approx(scaling)


def test_the_scaling_follows_each_layers_own_rank_and_alpha() -> None:
    patterns = {"rank_pattern": {"1": 9}, "alpha_pattern": {"1": 5.0}}
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    net = lora(net, r=4, lora_alpha=6, target_modules=["0", "1"], use_rslora=True, **patterns)
    assert [adapter(net, path).scaling for path in ("0", "1")] == [pytest.approx(6 / 2), pytest.approx(5 / 3)]


@pytest.mark.parametrize("layer", ["linear", "conv", "embedding"])
def test_the_scaling_is_all_that_changes(layer: str) -> None:
    """With α√r as its α, plain LoRA computes the same."""
    outputs = []
    for options in ({"lora_alpha": 6, "use_rslora": True}, {"lora_alpha": 6 * math.sqrt(2)}):
        net, x = net_and_input(layer)
        outputs.append(lora(net, init_lora_weights=False, **options)(x))
    torch.testing.assert_close(*outputs)
