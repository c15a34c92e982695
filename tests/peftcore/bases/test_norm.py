"""Views of normalisation layers."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from peftcore.bases import base_weight, is_adaptable


@pytest.mark.parametrize(
    ("layer", "adaptable"),
    [
        (nn.LayerNorm(4), True),
        (nn.GroupNorm(2, 4), True),
        (nn.RMSNorm(4), True),
        (nn.BatchNorm1d(4), False),  # running statistics
        (nn.LayerNorm(4, elementwise_affine=False), False),
        (nn.LayerNorm((2, 4)), False),  # a weight of two axes
    ],
)
def test_norms_scale_each_feature_by_a_weight(layer: nn.Module, adaptable: bool) -> None:
    assert is_adaptable(layer) == adaptable


def test_another_weight_goes_through_the_layers_own_forward() -> None:
    norm, x, weight = GemmaRMSNorm(4), torch.randn(3, 4), torch.randn(4)
    normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    torch.testing.assert_close(base_weight(norm).apply(x, weight), normalised * (1 + weight))
