"""Rounding with compensated errors, beside a computation that eliminates one column after another in float64."""

import pytest
import torch
from torch import Tensor

from peftcore.bases.grid import Grid
from peftcore.kernels import calibrated_rounding
from peftcore.kernels.calibrated_rounding import calibrated_codes


def example(columns: int = 50, rows: int = 7) -> tuple[Tensor, Tensor, Grid]:
    """A weight, the moment of correlated inputs, and a grid of 16 levels with a scale for each row and 10 columns."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    x = torch.randn(1000, columns) @ torch.randn(columns, columns) * torch.rand(columns).exp()
    scale = weight.unflatten(1, (-1, 10)).abs().amax(-1).repeat_interleave(10, 1)
    return weight, x.T @ x / 1000, Grid(torch.linspace(-1, 1, 16), scale, None, torch.float32)


def error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    return float(((weight - rounded) @ moment * (weight - rounded)).sum())


def eliminated(weight: Tensor, moment: Tensor, grid: Grid, damping: float, order: Tensor) -> Tensor:
    """Values by optimal brain surgery: the columns that are left get the best compensation of each column's error."""
    moment = moment.double() + damping * moment.diagonal().double().mean() * torch.eye(len(moment))
    left, weight, rounded = order.tolist(), weight.double().clone(), torch.empty_like(weight)
    while left:
        at, *left = left
        rounded[:, at] = grid.values(grid.nearest(weight[:, at].float(), at), at)
        if left:
            best = torch.linalg.solve(moment[left][:, left], moment[left, at])
            weight[:, left] += (weight[:, at] - rounded[:, at]).outer(best)
    return rounded


@pytest.mark.parametrize("activation_order", [False, True])
def test_every_error_is_compensated_as_well_as_the_later_columns_can(
    activation_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated_rounding, "BLOCK", 16)
    weight, moment, grid = example()
    rounded = grid.values(calibrated_codes(weight, moment, grid, 0.01, activation_order))
    order = moment.diagonal().argsort(descending=True, stable=True) if activation_order else torch.arange(50)
    expected = eliminated(weight, moment, grid, 0.01, order)
    assert (rounded != expected).float().mean() < 0.02, "codes on an edge may fall to either side in float32"
    nearest = grid.values(grid.nearest(weight))
    assert error(weight, rounded, moment) < 0.7 * error(weight, nearest, moment)


def test_inputs_without_correlation_give_the_nearest_values() -> None:
    weight, moment, grid = example(columns=20)
    codes = calibrated_codes(weight, torch.diag(moment.diagonal()), grid)
    assert torch.equal(codes, grid.nearest(weight))
    assert torch.equal(calibrated_codes(weight, torch.zeros(20, 20), grid), grid.nearest(weight))


def test_a_large_damping_relies_less_on_the_data() -> None:
    weight, moment, grid = example()
    nearest = grid.nearest(weight)
    changed = [(calibrated_codes(weight, moment, grid, d) != nearest).float().mean() for d in (0.01, 1e4)]
    assert changed[1] < 0.1 * changed[0]
