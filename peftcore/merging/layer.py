"""One layer of a combination: from the changes of several adapters to the factors of one."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Generator, Tensor

from peftcore.kernels.low_rank import Factors
from peftcore.merging.changes import Change
from peftcore.merging.factors import inner, reduced, reduced_dense, stacked
from peftcore.merging.mixing import mixed
from peftcore.merging.recipe import Recipe
from peftcore.merging.scalars import coefficients


class Combined(NamedTuple):
    """What is put at one layer."""

    factors: Factors
    bias: Tensor | None
    lost: Tensor | float
    """‖ΔW − BA‖² of what was to be and what is, squared Frobenius norm."""
    total: Tensor
    """‖ΔW‖²."""


def combined(
    changes: Sequence[Change | None],
    weights: Sequence[float],
    recipe: Recipe,
    rank: int | None,
    generator: Generator | None,
) -> Combined:
    """Combine what several adapters change at one layer; None stands for no change.

    rank: at most this, and never more than the sides of ΔW allow; None: all there is, which needs factors.
    """
    there = [change for change in changes if change is not None]
    if recipe.needs_dense:
        deltas = [None if change is None else change.dense() for change in changes]
        weight = mixed(deltas, weights, recipe, generator)
        bias = _mixed_biases(changes, weights, recipe, generator)
        return _cut(weight, bias, rank)
    chosen = coefficients(changes, weights, recipe)
    own = [c for c, change in zip(chosen, changes, strict=True) if change is not None]
    biases = [c * change.bias for c, change in zip(own, there, strict=True) if change.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    factors = [change.weight for change in there if isinstance(change.weight, Factors)]
    if len(factors) == len(there):
        return _cut(stacked(factors, own), bias, rank)
    dense = [c * change.dense() for c, change in zip(own, there, strict=True)]
    return _cut(sum(dense[1:], dense[0]), bias, rank)


def _mixed_biases(
    changes: Sequence[Change | None], weights: Sequence[float], recipe: Recipe, generator: Generator | None
) -> Tensor | None:
    biases = [None if change is None else change.bias for change in changes]
    return None if all(bias is None for bias in biases) else mixed(biases, weights, recipe, generator)


def _cut(change: Factors | Tensor, bias: Tensor | None, rank: int | None) -> Combined:
    if isinstance(change, Tensor):
        assert rank is not None
        factors, lost, total = reduced_dense(change, min(rank, *change.shape[1:]))
        return Combined(factors, bias, lost, total)
    most = min(change.b.shape[1], change.a.shape[2], change.rank if rank is None else rank)
    if change.rank <= most:
        return Combined(change, bias, 0.0, inner(change, change))
    factors, lost, total = reduced(change, most)
    return Combined(factors, bias, lost, total)
