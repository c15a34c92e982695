"""Sparsification of one change: the elements that a recipe drops, and the rescaling of the elements that it keeps.

- magnitude (TIES): keep the ⌊density · n⌋ largest elements.
- random (DARE): keep each element with probability density, and divide it by density.
- row_rank (DELLA): keep each element with probability p, and divide it by p. p goes from density − ε for the smallest
  element of a row to density + ε for its largest.
- outliers (breadcrumbs): drop the ⌊γ · n⌋ largest elements, and keep the ⌊density · n⌋ largest of the others.
"""

import torch
from torch import Generator, Tensor

from peftcore.merging.recipe import Recipe


def sparsified(x: Tensor, recipe: Recipe, generator: Generator | None) -> Tensor:
    """Return x of any shape, whose last axis is a row, with the elements that the recipe drops set to zero."""
    if recipe.sparsify == "magnitude":
        return x if recipe.density == 1 else _largest(x, recipe.density, skipped=0)
    if recipe.sparsify == "outliers":
        return _largest(x, recipe.density, skipped=int(recipe.gamma * x.numel()))
    if recipe.sparsify == "random":
        return _at_random(x, torch.full(x.shape, recipe.density), generator)
    if recipe.sparsify == "row_rank":
        return _at_random(x, _row_rank_probabilities(x, recipe), generator)
    return x


def _largest(x: Tensor, density: float, skipped: int) -> Tensor:
    """Keep the share `density` of elements that follow the `skipped` largest ones."""
    count = min(int(density * x.numel()), x.numel() - skipped)
    order = x.abs().flatten().topk(skipped + count, sorted=skipped > 0).indices[skipped:]
    sparse = torch.zeros_like(x).flatten()
    sparse[order] = x.flatten()[order]
    return sparse.view_as(x)


def _row_rank_probabilities(x: Tensor, recipe: Recipe) -> Tensor:
    """Return each element's probability of being kept, which grows with its rank in its row by magnitude."""
    rank = x.abs().argsort(-1).argsort(-1).float()
    steps = max(x.shape[-1] - 1, 1)
    position = rank / steps if x.shape[-1] > 1 else torch.full_like(rank, 0.5)
    return recipe.density + recipe.epsilon * (2 * position - 1)


def _at_random(x: Tensor, probability: Tensor, generator: Generator | None) -> Tensor:
    """Keep elements at random; the numbers are drawn on the CPU, so that a seed gives one result on every device."""
    mask = torch.bernoulli(probability.cpu(), generator=generator)
    return x * mask.to(x) / probability.to(x)
