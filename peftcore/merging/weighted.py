"""`add_weighted_adapter`: adapter merging by HF PEFT's names and semantics.

svd, cat and the *_svd types merge ΔW; cat is exact. The other types merge the factors A and B separately, each with the
weight √|ws|, and the sign on A. That is cheap, but not the sum of the changes: (B₁ + B₂)(A₁ + A₂) has cross terms.
TIES is PEFT's variant: signs are elected before the weights apply, and sums are divided by the number of agreeing
changes. `Recipe.ties` is the paper's variant.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError, OptionChoiceError, suggestion
from peftcore.kernels.factors import Factors, LowRankReport, inner, svd_of_factors
from peftcore.merging.elementwise import merged_elements
from peftcore.merging.ia3_vectors import add_ia3, all_ia3
from peftcore.merging.layer import MergedLayer, merged_layer
from peftcore.merging.merge import add_layers, decomposition_errors_as_merge_errors
from peftcore.merging.recipe import Elect, Recipe, check_density
from peftcore.merging.sources import Sources
from peftcore.merging.weight_changes import Change

SEPARATE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combination types that merge A and B separately."""
KINDS = ("svd", "cat", *SEPARATE, *(f"{kind}_svd" for kind in SEPARATE[1:]))
"""Values of `combination_type`."""
SIGN_METHODS: dict[str, Elect] = {"total": "sum", "frequency": "count"}
_DEFAULT = ("svd", None, None)
DRIVERS = (None, "gesvd", "gesvdj", "gesvda")


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> LowRankReport:
    """Add a LoRA that is a weighted combination of other adapters; it is frozen and not active.

    If all adapters are IA3, "linear", and "svd" without svd_rank and svd_clamp, add an IA3 with the weighted sum of the
    vectors, as PEFT does.

    Differences from PEFT: a name that exists is an error. A single adapter is merged by the type that was asked for,
    not by "linear". `cat` and `svd` take adapters of every mergeable method, and DoRA with its magnitude.

    Args:
        model: a model with adapters.
        adapters: names of the source adapters.
        weights: one weight for each of them.
        adapter_name: the new adapter's name.
        combination_type: one of `KINDS`.
        svd_rank: largest rank (count) of svd and *_svd; None: the largest of the adapters.
        svd_clamp: quantile of the elements of B = U·S and A = Vᵀ to which they are clamped; the report does not count
            the clamping as an error.
        svd_full_matrices: True or False, with the same result, as in PEFT.
        svd_driver: without effect, with a warning: no driver of CUDA is called.
        density: share of elements to keep, in (0, 1], for types that prune.
        majority_sign_method: "total", the sign of the sum, or "frequency", the sign of the majority of changes; for the
            types with "ties".

    Options that a type does not use give a warning.

    Returns:
        Rank and error of each layer.

    Raises:
        AdapterNameError, ConfigError, MergeError: the arguments or the adapters do not fit; the model is unchanged.
    """
    recipe = _recipe(combination_type, density, majority_sign_method)
    _check_svd(svd_clamp, svd_driver, svd_full_matrices)
    options = {"svd_rank": svd_rank, "svd_clamp": svd_clamp, "svd_driver": svd_driver, "density": density}
    _warn_of_unused(combination_type, {**options, "majority_sign_method": majority_sign_method})
    if len(adapters) != len(weights):
        raise ConfigError(f"each adapter needs one weight: got {len(adapters)} adapters and {len(weights)} weights")
    recipe.check_weights(weights)
    sources = Sources(model, adapters, adapter_name)
    by_svd = combination_type.endswith("svd")
    if all_ia3(sources) and (combination_type == "linear" or (combination_type, svd_rank, svd_clamp) == _DEFAULT):
        return add_ia3(model, adapter_name, sources, weights)
    sources.check_rank("svd_rank", svd_rank)
    rank = (svd_rank or sources.largest_rank()) if by_svd else None
    layers: dict[str, MergedLayer] = {}
    with decomposition_errors_as_merge_errors():
        for path, changes in sources.changes():
            if not by_svd:
                _check_factors(combination_type, sources, path, changes)
            if combination_type in SEPARATE:
                layers[path] = _merged_separately(changes, weights, recipe)
                continue
            layer = merged_layer(changes, weights, recipe, rank, None)
            if by_svd and svd_clamp is not None:
                layer = layer._replace(factors=_clamped(layer.factors, svd_clamp))
            layers[path] = layer
    return add_layers(model, adapter_name, sources, layers)


def _recipe(kind: str, density: float | None, majority: str) -> Recipe:
    if kind not in KINDS:
        raise ConfigError(f"combination_type {kind!r} is unknown{suggestion(str(kind), list(KINDS))}")
    if majority not in SIGN_METHODS:
        raise OptionChoiceError(f"majority_sign_method must be 'total' or 'frequency'; got {majority!r}")
    if kind in ("svd", "cat", "linear"):
        return Recipe()
    check_density(f"density for combination_type={kind!r}", density)
    sparsify = "random" if kind.startswith("dare") else "magnitude"
    if "ties" not in kind:
        return Recipe(sparsify, cast(float, density), seed=None)
    elect = SIGN_METHODS[majority]
    return Recipe(sparsify, cast(float, density), elect=elect, elect_weighted=False, normalise="count", seed=None)


def _warn_of_unused(kind: str, options: Mapping[str, Any]) -> None:
    used = {"svd_rank", "svd_clamp"} if kind.endswith("svd") else set()
    if kind not in ("svd", "cat", "linear"):
        used.add("density")
    if "ties" in kind:
        used.add("majority_sign_method")
    unused = [name for name, value in options.items() if name not in used and value not in (None, "total")]
    if unused:
        warnings.warn(f"combination_type={kind!r}: {', '.join(unused)} has no effect; leave it out", stacklevel=4)


def _check_svd(clamp: float | None, driver: str | None, full_matrices: bool) -> None:
    if not isinstance(full_matrices, bool):
        raise ConfigError(f"svd_full_matrices must be True or False; got {full_matrices!r}")
    if clamp is not None and not 0.5 < clamp <= 1:
        raise ConfigError(f"svd_clamp is a quantile above 0.5 and at most 1; got {clamp!r}; try 0.99")
    if driver not in DRIVERS:
        raise ConfigError(f"svd_driver must be None, 'gesvd', 'gesvdj' or 'gesvda'; got {driver!r}")


def _check_factors(kind: str, sources: Sources, path: str, changes: Sequence[Change | None]) -> None:
    """Raise ConfigError unless every change has factors, of one rank if A and B are merged separately."""
    ranks = {}
    for name, change in zip(sources.names, changes, strict=True):
        if change is not None and not isinstance(change.weight, Factors):
            raise ConfigError(
                f"combination_type={kind!r} needs the factors A and B, and the change of adapter {name!r} at {path} is "
                "not their product; take 'svd', which merges ΔW"
            )
        if change is not None:
            ranks[name] = cast(Factors, change.weight).rank
    if kind in SEPARATE and len(set(ranks.values())) > 1:
        raise ConfigError(
            f"combination_type={kind!r} adds factors of the same rank; at {path} they are {ranks}; take 'cat' or 'svd'"
        )


def _merged_separately(changes: Sequence[Change | None], weights: Sequence[float], recipe: Recipe) -> MergedLayer:
    factors = [None if change is None else cast(Factors, change.weight) for change in changes]
    scales = [0.0 if own is None else w * own.scaling for own, w in zip(factors, weights, strict=True)]
    sizes = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(size, scale) for size, scale in zip(sizes, scales, strict=True)]
    a = merged_elements([own and own.a for own in factors], signed, recipe, None)
    b = merged_elements([own and own.b for own in factors], sizes, recipe, None)
    biases = [w * c.bias for c, w in zip(changes, weights, strict=True) if c is not None and c.bias is not None]
    merged = Factors(a, b)
    return MergedLayer(merged, sum(biases[1:], biases[0]) if biases else None, 0.0, inner(merged, merged))


def _clamped(change: Factors, quantile: float) -> Factors:
    """Clamp B = U·S and A = Vᵀ to ± a quantile of their elements.

    The quantile depends on the signs of the singular vectors, which an SVD leaves open. Here the largest element of
    each row of A is positive.
    """
    a, b, _ = svd_of_factors(change, change.rank).factors()
    signs = a.gather(2, a.abs().argmax(2, keepdim=True)).sign()
    a, b = a * signs, b * signs.mT
    limit = _quantile(torch.cat([b.flatten(), a.flatten()]), quantile)
    return Factors(a.clamp(-limit, limit), b.clamp(-limit, limit))


def _quantile(values: Tensor, share: float) -> Tensor:
    """Interpolate between the two nearest elements; `torch.quantile` takes 16 million elements at most."""
    position = share * (len(values) - 1)
    ordered = values.sort().values
    return torch.lerp(ordered[math.floor(position)], ordered[math.ceil(position)], position - math.floor(position))
