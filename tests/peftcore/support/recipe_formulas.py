"""Checks of merging recipes against formulas on dense changes."""

from typing import Any

import torch
from torch import Tensor

from peftcore.merging import Recipe

FULL = 8
"""Rank that holds any ΔW of these layers."""


def check(model: Any, changes: Any, recipe: Recipe, weights: dict[str, float], formula: Any) -> None:
    """The combination is `formula` of each layer's changes, and a rank that holds all of it loses nothing."""
    report = model.add_merged("m", weights, recipe, rank=FULL)
    made = changes(model, "m")
    assert made and report.error < 1e-7
    for path, found in made.items():
        expected = formula([changes(model, name)[path] for name in weights], list(weights.values()))
        assert torch.allclose(found, expected, atol=1e-10), path
        assert expected.abs().max() > 1e-2
    model.delete_adapter("m")


def largest(x: Tensor, count: int) -> Tensor:
    """x with all but its `count` largest elements set to zero, found by sorting."""
    bound = x.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(x.abs() >= bound, x, 0)
