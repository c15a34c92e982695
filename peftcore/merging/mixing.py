"""A recipe applied to tensors element by element; see `peftcore.merging.recipe` for the equation."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from peftcore.merging.recipe import Recipe
from peftcore.merging.sparsify import sparsified


def mixed(
    tensors: Sequence[Tensor | None], weights: Sequence[float], recipe: Recipe, generator: Generator | None
) -> Tensor:
    """One tensor of several of the same shape; None stands for zeros, and at least one is not None."""
    own = [(w, sparsified(x, recipe, generator)) for x, w in zip(tensors, weights, strict=True) if x is not None]
    if recipe.elect is None:
        total = torch.stack([w * x for w, x in own]).sum(0)
        return total * (recipe.scale / sum(weights) if recipe.normalise == "weights" else recipe.scale)
    positive = _elected([w * x if recipe.elect_weighted else x for w, x in own], recipe)
    total, divisor = torch.zeros_like(positive, dtype=own[0][1].dtype), torch.zeros_like(own[0][1])
    for w, x in own:
        voting = w * x if recipe.elect_weighted else x
        agrees = torch.where(positive, voting > 0, voting < 0)
        total += w * x * agrees
        divisor += agrees if recipe.normalise == "count" else abs(w) * agrees
    if recipe.normalise == "weights":
        return total * (recipe.scale / sum(weights))
    if recipe.normalise is None:
        return total * recipe.scale
    return total * (recipe.scale / torch.where(divisor > 0, divisor, 1))


def _elected(voting: list[Tensor], recipe: Recipe) -> Tensor:
    """Where + was elected."""
    votes = torch.stack(voting)
    return (votes.sum(0) if recipe.elect == "sum" else votes.sign().sum(0)) >= 0
