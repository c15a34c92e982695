"""What a recipe drops of one change, and how it makes up for it.

magnitude: the floor(density · n) elements that are largest stay. random (DARE): each stays with the probability
density, divided by it. row_rank (DELLA): the same with p from density − ε for the smallest element of a row to
density + ε for its largest. outliers (breadcrumbs): as magnitude, below the floor(γ · n) largest.
"""

import torch
from torch import Generator, Tensor

from peftcore.merging.recipe import Recipe


def sparsified(x: Tensor, recipe: Recipe, generator: Generator | None) -> Tensor:
    """x of any shape, whose last axis is a row, with what the recipe drops set to zero."""
    if recipe.sparsify == "magnitude":
        return x if recipe.density == 1 else _largest(x, recipe.density, skipped=0)
    if recipe.sparsify == "outliers":
        return _largest(x, recipe.density, skipped=int(recipe.gamma * x.numel()))
    if recipe.sparsify == "random":
        return _at_random(x, torch.full(x.shape, recipe.density), generator)
    if recipe.sparsify == "row_rank":
        return _at_random(x, _by_rank(x, recipe), generator)
    return x


def _largest(x: Tensor, density: float, skipped: int) -> Tensor:
    """The elements that come after the `skipped` largest."""
    count = min(int(density * x.numel()), x.numel() - skipped)
    order = x.abs().flatten().topk(skipped + count, sorted=skipped > 0).indices[skipped:]
    kept = torch.zeros_like(x).flatten()
    kept[order] = x.flatten()[order]
    return kept.view_as(x)


def _by_rank(x: Tensor, recipe: Recipe) -> Tensor:
    """Each element's chance of being kept, by its place in its row."""
    rank = x.abs().argsort(-1).argsort(-1).float()
    steps = max(x.shape[-1] - 1, 1)
    place = rank / steps if x.shape[-1] > 1 else torch.full_like(rank, 0.5)
    return recipe.density + recipe.epsilon * (2 * place - 1)


def _at_random(x: Tensor, chance: Tensor, generator: Generator | None) -> Tensor:
    """Drawn on the CPU, so that a seed means the same on every device."""
    drawn = torch.bernoulli(chance.cpu(), generator=generator)
    return x * drawn.to(x) / chance.to(x)
