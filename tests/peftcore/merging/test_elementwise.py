"""TIES equals its formula, computed one element at a time."""

import itertools
from typing import Any

import pytest
import torch
from recipe_formulas import check, largest
from torch import Tensor

from peftcore.merging import Recipe
from peftcore.merging.elementwise import merged_elements
from peftcore.merging.sparsify import sparsified


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 2.0, "b": 0.3, "c": 1.0}], ids=str)
def test_ties_of_the_paper(weights: dict[str, float], model: Any, changes: Any) -> None:
    def formula(deltas: list[Tensor], w: list[float]) -> Tensor:
        kept = [largest(d, int(0.4 * d.numel())) for d in deltas]
        out = torch.zeros_like(kept[0])
        for place in itertools.product(*map(range, out.shape)):
            values = [float(k[place]) for k in kept]
            total = sum(v * x for v, x in zip(w, values, strict=True))
            agreeing = [(v, x) for v, x in zip(w, values, strict=True) if x * total > 0]
            if agreeing:
                out[place] = 0.7 * sum(v * x for v, x in agreeing) / sum(v for v, _ in agreeing)
        return out

    check(model, changes, Recipe.ties(density=0.4, scale=0.7), weights, formula)


def test_ties_takes_away_what_has_a_negative_weight(linears: Any, changes: Any) -> None:
    """The weight's sign stays: −2Δ divided by −2 would be Δ again."""
    check(linears(a={}), changes, Recipe.ties(density=1), {"a": -2.0}, lambda d, _w: -d[0])


@pytest.mark.parametrize("recipe", [Recipe.dare_ties(0.6, 0.5), Recipe.della(0.6, 0.2, 0.5)], ids=["dare", "della"])
def test_chance_comes_before_the_election(recipe: Recipe) -> None:
    torch.manual_seed(0)
    x = [torch.randn(8, 12, dtype=torch.float64) for _ in range(3)]
    weights = [1.0, 0.5, 2.0]
    again = torch.Generator().manual_seed(3)
    kept = [sparsified(own, recipe, again) for own in x]
    found = merged_elements(x, weights, recipe, torch.Generator().manual_seed(3))
    weighed = torch.stack([w * k for w, k in zip(weights, kept, strict=True)])
    agrees = weighed.sign() == weighed.sum(0).sign()
    n = (torch.tensor(weights).view(3, 1, 1) * agrees * (weighed != 0)).sum(0)
    expected = torch.where(n > 0, 0.5 * (weighed * agrees).sum(0) / n.clamp_min(1e-9), 0)
    assert torch.allclose(found, expected, atol=1e-7)
