"""Adapters combined by a `Recipe` into a LoRA, layer by layer."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError, MergeError
from peftcore.merging.layer import Combined, combined
from peftcore.merging.layer_pairs import place
from peftcore.merging.recipe import Recipe
from peftcore.merging.sources import Sources

_NOT_FINITE = "the combination holds NaN or Inf, so nothing was added; look for an adapter whose training went wrong"


@dataclass(frozen=True)
class MergeReport:
    """What became of a combination. Errors: ‖ΔW − BA‖ / ‖ΔW‖ (Frobenius), what was cut off by the ranks."""

    ranks: Mapping[str, int]
    """Rank (count) by path of the layer."""
    errors: Mapping[str, float]
    """By path; 0 where nothing was cut off."""
    error: float
    """Of all layers together."""


@torch.no_grad()
def add_merged(
    model: nn.Module, name: str, weights: Mapping[str, float], recipe: Recipe, rank: int | None = None
) -> MergeReport:
    """Add a LoRA that is the combination of others, which stay as they are; it is frozen, and not active.

    weights: {adapter of any method that can be merged: its weight}. A layer that an adapter leaves alone counts as
    zero there; what an adapter trains whole goes along as it is, if no other does (see `peftcore.merging.extra_modules`).
    rank: the most that a layer gets (count). None: without loss where all have factors and the recipe needs no dense
    ΔW, which is then never formed; else the adapters' largest rank at that layer.
    Raises AdapterNameError, ConfigError, or MergeError for what no LoRA can hold; the model is then as it was.
    """
    values = list(weights.values())
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"a recipe such as Recipe.ties(density=0.2) says how to combine; got {recipe!r}")
    recipe.check_weights(values)
    sources = Sources(model, list(weights), name)
    sources.check_rank("rank", rank)
    generator = None if recipe.seed is None else torch.Generator().manual_seed(recipe.seed)
    layers: dict[str, Combined] = {}
    with refusing_what_is_not_finite():
        for path, changes in sources.changes():
            dense = recipe.needs_dense or any(isinstance(c.weight, Tensor) for c in changes if c is not None)
            most = sources.largest_rank(path) if rank is None and dense else rank
            layers[path] = combined(changes, values, recipe, most, generator)
    return finish(model, name, sources, layers)


@contextlib.contextmanager
def refusing_what_is_not_finite() -> Iterator[None]:
    """A decomposition that fails inside is a MergeError."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise MergeError(f"{_NOT_FINITE} ({error})") from error


def finish(model: nn.Module, name: str, sources: Sources, layers: Mapping[str, Combined]) -> MergeReport:
    """Put what was combined into the model, and say what it lacks; MergeError if it is not finite."""
    lost = torch.tensor([float(own.lost) for own in layers.values()], dtype=torch.float64)
    total = torch.tensor([float(own.total) for own in layers.values()], dtype=torch.float64)
    for path, square in zip(layers, total.tolist(), strict=True):
        if not math.isfinite(square):
            raise MergeError(f"{path}: {_NOT_FINITE}")
    shares = (lost / torch.where(total > 0, total, 1)).sqrt().tolist()
    ranks = place(model, name, sources, layers)
    whole = float((lost.sum() / total.sum()).sqrt()) if total.sum() > 0 else 0.0
    return MergeReport(ranks, dict(zip(layers, shares, strict=True)), whole)
