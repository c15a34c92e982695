"""Views of raw parameters."""

import pytest
import torch
from torch import nn

from peftcore.bases import BiasParameter, ParameterWeight, raw_projections
from peftcore.errors import TargetError


class Experts(nn.Module):
    """Three experts with 4 outputs and 5 inputs, stored as (experts, out, in) or transposed."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(3, 5, 4) if is_transposed else torch.randn(3, 4, 5))
        self.bias = nn.Parameter(torch.randn(4))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_experts_are_read_and_written_in_canonical_orientation(is_transposed: bool) -> None:
    experts = Experts(is_transposed)
    base = ParameterWeight(experts, "weight")
    assert (base.count, base.out_features, base.in_features) == (3, 4, 5)
    assert base.read().shape == (3, 4, 5)
    before, stored = base.state(), experts.weight
    base.write(torch.ones(3, 4, 5))
    assert experts.weight.shape == stored.shape and torch.equal(base.read(), torch.ones(3, 4, 5))
    base.restore(before)
    assert experts.weight is stored


def test_dimensions_that_are_neither_a_matrix_nor_a_stack_are_refused() -> None:
    with pytest.raises(TargetError, match=r"only \(o, i\) and \(e, o, i\) fit"):
        ParameterWeight(Experts(False), "bias")
    assert BiasParameter(Experts(False), "bias").out_features == 4


def test_attention_with_separate_matrices_names_the_parameters_to_target() -> None:
    assert raw_projections(nn.MultiheadAttention(8, 2)) == ("in_proj_weight", "out_proj.weight")
    assert raw_projections(nn.Linear(8, 8)) == ()
    with pytest.raises(TargetError, match="q_proj_weight, k_proj_weight, v_proj_weight"):
        raw_projections(nn.MultiheadAttention(8, 2, kdim=4))
