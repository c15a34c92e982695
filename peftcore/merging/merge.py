"""`add_merged`: merge adapters into a new LoRA by a `Recipe`, layer by layer."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError, MergeError
from peftcore.kernels.factors import LowRankReport
from peftcore.merging.insertion import insert_lora
from peftcore.merging.layer import MergedLayer, merged_layer
from peftcore.merging.recipe import Recipe
from peftcore.merging.sources import Sources

_NOT_FINITE = "the merged weights hold NaN or Inf, so nothing was added; look for an adapter whose training diverged"


@torch.no_grad()
def add_merged(
    model: nn.Module, name: str, weights: Mapping[str, float], recipe: Recipe, rank: int | None = None
) -> LowRankReport:
    """Merge adapters of a model into a new LoRA of that model; the source adapters stay unchanged.

    The new adapter is frozen and not active. A layer that an adapter does not change counts as ΔW = 0 for it. Extra
    trained modules are copied if only one adapter has them (see `peftcore.merging.extra_modules`).

    Args:
        model: a model with adapters.
        name: the new adapter's name.
        weights: {name of an adapter of any mergeable method: its weight}.
        recipe: how to merge, such as `Recipe.ties()`.
        rank: largest rank of a layer (count). None: the exact result if all changes have factors and the recipe needs
            no dense ΔW, which is then never formed; else the largest rank of the adapters at that layer.

    Returns:
        Rank and error of each layer.

    Raises:
        AdapterNameError: a source adapter does not exist, or the new name is taken.
        ConfigError: the recipe, a weight or the rank is not valid.
        MergeError: a LoRA cannot hold the result. After every error the model is unchanged.
    """
    values = list(weights.values())
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe must be a Recipe, such as Recipe.ties(density=0.2); got {recipe!r}")
    recipe.check_weights(values)
    sources = Sources(model, list(weights), name)
    sources.check_rank("rank", rank)
    generator = None if recipe.seed is None else torch.Generator().manual_seed(recipe.seed)
    layers: dict[str, MergedLayer] = {}
    with decomposition_errors_as_merge_errors():
        for path, changes in sources.changes():
            dense = recipe.needs_dense or any(isinstance(c.weight, Tensor) for c in changes if c is not None)
            layer_rank = sources.largest_rank(path) if rank is None and dense else rank
            layers[path] = merged_layer(changes, values, recipe, layer_rank, generator)
    return add_layers(model, name, sources, layers)


@contextlib.contextmanager
def decomposition_errors_as_merge_errors() -> Iterator[None]:
    """Turn a failed matrix decomposition inside the context into a MergeError."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise MergeError(f"{_NOT_FINITE} ({error})") from error


def add_layers(model: nn.Module, name: str, sources: Sources, layers: Mapping[str, MergedLayer]) -> LowRankReport:
    """Add the merged layers to the model as a new LoRA; MergeError if a value is NaN or infinite."""
    squares = {path: (float(layer.lost), float(layer.total)) for path, layer in layers.items()}
    for path, (_, total) in squares.items():
        if not math.isfinite(total):
            raise MergeError(f"{path}: {_NOT_FINITE}")
    return LowRankReport.of(insert_lora(model, name, sources, layers), squares)
