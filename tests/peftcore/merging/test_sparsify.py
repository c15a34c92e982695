"""Each sparsification drops and rescales the elements that its paper says."""

from typing import Any

import pytest
import torch
from recipe_formulas import FULL, check, largest
from torch import Tensor

from peftcore.merging import Recipe
from peftcore.merging.sparsify import sparsified


def test_magnitude_pruning_over_the_whole_change_of_a_layer(model: Any, changes: Any) -> None:
    def formula(deltas: list[Tensor], w: list[float]) -> Tensor:
        return sum((v * largest(d, int(0.25 * d.numel())) for d, v in zip(deltas, w, strict=True)), torch.zeros(()))

    check(model, changes, Recipe.magnitude_prune(0.25), {"a": 1.0, "b": -0.5}, formula)


@pytest.mark.parametrize("gamma", [0.0, 0.001, 0.1])
def test_breadcrumbs_drop_both_ends(gamma: float, model: Any, changes: Any) -> None:
    """Also where γ drops nothing: a slice [n:-0] would keep nothing at all."""

    def formula(deltas: list[Tensor], w: list[float]) -> Tensor:
        total = torch.zeros_like(deltas[0])
        for delta, v in zip(deltas, w, strict=True):
            order = delta.abs().flatten().argsort(descending=True).tolist()
            top = int(gamma * delta.numel())
            kept = torch.zeros_like(delta).flatten()
            for place in order[top : top + int(0.6 * delta.numel())]:
                kept[place] = delta.flatten()[place]
            total += v * kept.view_as(delta)
        return 0.5 * total

    check(model, changes, Recipe.breadcrumbs(0.6, gamma, scale=0.5), {"a": 1.0, "b": 2.0}, formula)


def test_dare_keeps_elements_at_random_and_divides_by_the_density() -> None:
    x = torch.arange(1.0, 20_001, dtype=torch.float64).view(100, 200)
    for density in (0.1, 0.5):
        found = sparsified(x, Recipe.dare_linear(density), torch.Generator().manual_seed(0))
        kept = found != 0
        assert torch.allclose(found[kept], x[kept] / density, rtol=1e-6)
        assert abs(kept.double().mean() - density) < 0.02
        assert abs(found.mean() / x.mean() - 1) < 0.05, "the expected change must be the whole one"


def test_della_keeps_large_elements_of_a_row_likelier_and_divides_by_the_chance() -> None:
    """p from density − ε to density + ε by the place in its own row, whatever the other rows hold."""
    row = torch.linspace(1, 2, 11, dtype=torch.float64)[torch.randperm(11, generator=torch.Generator().manual_seed(0))]
    x = torch.stack([row * -(10.0**exponent) for exponent in range(4)] * 5000)
    found = sparsified(x, Recipe.della(0.5, 0.3), torch.Generator().manual_seed(0))
    chance = 0.2 + 0.6 * (row - 1)
    share = (found != 0).double().mean(0)
    assert (share - chance).abs().max() < 0.02
    kept = found != 0
    assert torch.allclose(found[kept], (x / chance)[kept], rtol=1e-6)
    one = torch.ones(1000, 1)
    assert abs(sparsified(one, Recipe.della(0.5, 0.3), torch.Generator().manual_seed(0)).mean() - 1) < 0.1


def test_a_seed_gives_the_same_and_another_seed_another(model: Any, changes: Any) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        torch.manual_seed(seed + len(name))
        model.add_merged(name, {"a": 1.0, "b": 1.0}, Recipe.dare_linear(0.5, seed=seed), rank=FULL)
    x, y, z = (changes(model, name)["0"] for name in "xyz")
    assert torch.equal(x, y) and not torch.allclose(x, z)
    torch.random.set_rng_state(before)
