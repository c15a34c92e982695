"""A parameter is cut down together with its moments, in whatever form the optimiser keeps them."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from peftcore._util.state_pruning import can_prune, pruned
from peftcore.train import FusedAdamW

KEPT = torch.tensor([0, 3, 4, 9])


def made(kind: Any, **options: Any) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    """A parameter (12, 640), another one, and the optimiser after three steps."""
    torch.manual_seed(0)
    parameter, other = nn.Parameter(torch.randn(12, 640)), nn.Parameter(torch.randn(3))
    optimizer = kind([parameter, other], lr=1e-2, **options)
    for _ in range(3):
        parameter.grad, other.grad = torch.randn_like(parameter), torch.randn_like(other)
        optimizer.step()
    return parameter, other, optimizer


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.Adafactor, FusedAdamW, bnb.optim.AdamW, bnb.optim.AdamW8bit]
)
def test_training_goes_on_as_for_the_whole_parameter(kind: Any, axis: int) -> None:
    """AdamW treats each element by itself, so the kept ones must get the numbers that they would have got."""
    parameter, other, optimizer = made(kind)
    if kind is torch.optim.Adafactor:
        assert not can_prune(parameter, optimizer), "its moments are factors of the whole matrix"
        return
    assert can_prune(parameter, optimizer)
    whole, _, reference = made(kind)
    gradient = torch.randn_like(parameter)
    small = pruned(parameter, axis, KEPT, optimizer)
    assert torch.equal(small, whole.index_select(axis, KEPT))
    assert small.requires_grad and parameter not in optimizer.state
    assert optimizer.param_groups[0]["params"][0] is small and optimizer.param_groups[0]["params"][1] is other
    small.grad, whole.grad = gradient.index_select(axis, KEPT), gradient
    optimizer.step()
    reference.step()
    packed = kind is bnb.optim.AdamW8bit
    # moments that are packed anew are rounded to 8 bits once more, by other blocks
    torch.testing.assert_close(small, whole.index_select(axis, KEPT), rtol=0, atol=2e-3 if packed else 0)
    if packed:
        assert optimizer.state[small]["state1"].dtype == torch.uint8
        moved = (small - whole.index_select(axis, KEPT)).abs()
        assert moved.mean() < 1e-4, "a step is 1e-2"


@pytest.mark.parametrize("kind", [torch.optim.AdamW, bnb.optim.AdamW8bit])
def test_nothing_may_be_left(kind: Any) -> None:
    parameter, _, optimizer = made(kind)
    small = pruned(parameter, 0, torch.tensor([], dtype=torch.long), optimizer)
    small.grad = torch.zeros_like(small)
    optimizer.step()
    assert small.shape == (0, 640)


def test_a_parameter_without_moments_yet_takes_its_place() -> None:
    parameter = nn.Parameter(torch.randn(12, 4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    small = pruned(parameter, 0, KEPT, optimizer)
    assert optimizer.param_groups[0]["params"] == [small] and not optimizer.state
