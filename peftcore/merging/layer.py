"""The merge of one layer: from the changes of several adapters to the factors of one LoRA."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Generator, Tensor

from peftcore.kernels.factors import Factors, inner, stacked, svd_of_dense, svd_of_factors
from peftcore.merging.coefficients import coefficients
from peftcore.merging.elementwise import merged_elements
from peftcore.merging.recipe import Recipe
from peftcore.merging.weight_changes import Change


class MergedLayer(NamedTuple):
    """The merged change of one layer, as the new LoRA holds it."""

    factors: Factors
    bias: Tensor | None
    lost: Tensor | float
    """Squared Frobenius norm of what the rank cuts off, ‖ΔW − BA‖²."""
    total: Tensor
    """‖ΔW‖²."""


def merged_layer(
    changes: Sequence[Change | None],
    weights: Sequence[float],
    recipe: Recipe,
    rank: int | None,
    generator: Generator | None,
) -> MergedLayer:
    """Merge the changes of several adapters at one layer; a change is None if its adapter does not change the layer.

    The result has at most the given rank. None gives the exact result, which needs factors of every change and a recipe
    without dense ΔW. The generator serves recipes that drop elements at random; None is PyTorch's default generator.
    """
    present = [change for change in changes if change is not None]
    if recipe.needs_dense:
        deltas = [None if change is None else change.dense() for change in changes]
        weight = merged_elements(deltas, weights, recipe, generator)
        return _truncated(weight, _merged_biases(changes, weights, recipe, generator), rank)
    per_change = coefficients(changes, weights, recipe)
    scales = [c for c, change in zip(per_change, changes, strict=True) if change is not None]
    biases = [c * change.bias for c, change in zip(scales, present, strict=True) if change.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    factors = [change.weight for change in present if isinstance(change.weight, Factors)]
    if len(factors) == len(present):
        return _truncated(stacked(factors, scales), bias, rank)
    dense = [c * change.dense() for c, change in zip(scales, present, strict=True)]
    return _truncated(sum(dense[1:], dense[0]), bias, rank)


def _merged_biases(
    changes: Sequence[Change | None], weights: Sequence[float], recipe: Recipe, generator: Generator | None
) -> Tensor | None:
    biases = [None if change is None else change.bias for change in changes]
    return None if all(bias is None for bias in biases) else merged_elements(biases, weights, recipe, generator)


def _truncated(change: Factors | Tensor, bias: Tensor | None, rank: int | None) -> MergedLayer:
    if isinstance(change, Tensor):
        assert rank is not None
        svd = svd_of_dense(change, min(rank, *change.shape[1:]))
    else:
        largest = min(change.b.shape[1], change.a.shape[2], change.rank if rank is None else rank)
        if change.rank <= largest:
            return MergedLayer(change, bias, 0.0, inner(change, change))
        svd = svd_of_factors(change, largest)
    return MergedLayer(svd.factors(), bias, svd.lost, svd.total)
