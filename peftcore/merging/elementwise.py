"""Element-wise merging of tensors by a recipe; `peftcore.merging.recipe` has the equation."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from peftcore.merging.recipe import Recipe
from peftcore.merging.sparsify import sparsified


def merged_elements(
    tensors: Sequence[Tensor | None], weights: Sequence[float], recipe: Recipe, generator: Generator | None
) -> Tensor:
    """Merge tensors of the same shape into one; None stands for zeros, and at least one tensor is not None."""
    present = [(w, sparsified(x, recipe, generator)) for x, w in zip(tensors, weights, strict=True) if x is not None]
    if recipe.elect is None:
        total = torch.stack([w * x for w, x in present]).sum(0)
        return total * (recipe.scale / sum(weights) if recipe.normalise == "weights" else recipe.scale)
    positive = _elected_positive([w * x if recipe.elect_weighted else x for w, x in present], recipe)
    total, divisor = torch.zeros_like(positive, dtype=present[0][1].dtype), torch.zeros_like(present[0][1])
    for w, x in present:
        vote = w * x if recipe.elect_weighted else x
        agrees = torch.where(positive, vote > 0, vote < 0)
        total += w * x * agrees
        divisor += agrees if recipe.normalise == "count" else abs(w) * agrees
    if recipe.normalise == "weights":
        return total * (recipe.scale / sum(weights))
    if recipe.normalise is None:
        return total * recipe.scale
    return total * (recipe.scale / torch.where(divisor > 0, divisor, 1))


def _elected_positive(votes: list[Tensor], recipe: Recipe) -> Tensor:
    """Return a mask of the elements whose elected sign is +."""
    stack = torch.stack(votes)
    return (stack.sum(0) if recipe.elect == "sum" else stack.sign().sum(0)) >= 0
