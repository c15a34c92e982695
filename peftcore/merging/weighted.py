"""HF PEFT's `add_weighted_adapter`: its names and what they mean there.

svd, cat and the *_svd kinds combine ΔW; cat is exact. The others combine the factors A and B apart, each with the
weight √|ws|, and the sign on A: cheap, and not the sum of the changes, since (B₁ + B₂)(A₁ + A₂) has cross terms.
TIES is PEFT's: signs are elected before weights, and sums divided by how many agree (`Recipe.ties` is the paper's).
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError, suggestion
from peftcore.kernels.low_rank import Factors
from peftcore.merging.changes import Change
from peftcore.merging.factors import inner, reduced
from peftcore.merging.layer import Combined, combined
from peftcore.merging.merging import MergeReport, finish, refusing_what_is_not_finite
from peftcore.merging.mixing import mixed
from peftcore.merging.recipe import Elect, Recipe, check_density
from peftcore.merging.sources import Sources

APART = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Kinds that combine A and B apart."""
KINDS = ("svd", "cat", *APART, *(f"{kind}_svd" for kind in APART[1:]))
"""What `combination_type` may be."""
SIGN_METHODS: dict[str, Elect] = {"total": "sum", "frequency": "count"}
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
) -> MergeReport:
    """Add a LoRA that is a weighted combination of others, frozen and not active.

    svd_rank: rank (count) of svd and *_svd; None: the largest among the adapters. A layer gets no more than it needs.
    svd_clamp: quantile of the elements of B = U·S and A = Vᵀ that they are clamped to; not counted as an error.
    svd_full_matrices, svd_driver: taken for PEFT's sake; the result does not depend on them.
    density: share of elements kept, in (0, 1], for kinds that prune; others do not look at it.
    majority_sign_method: "total", the sign of the sum, or "frequency", that of most changes.
    Different from PEFT: a name that is taken is an error; one adapter alone is combined as is asked for, not by
    "linear"; `cat` and `svd` take adapters of any method that can be merged, DoRA as what it computes.
    Raises AdapterNameError, ConfigError or MergeError; the model is then as it was.
    """
    recipe = _recipe(combination_type, density, majority_sign_method)
    _check_svd(svd_clamp, svd_driver)
    if len(adapters) != len(weights):
        raise ConfigError(f"each adapter needs one weight: got {len(adapters)} adapters and {len(weights)} weights")
    recipe.check_weights(weights)
    sources = Sources(model, adapters, adapter_name)
    by_svd = combination_type.endswith("svd")
    sources.check_rank("svd_rank", svd_rank)
    rank = (svd_rank or sources.largest_rank()) if by_svd else None
    layers: dict[str, Combined] = {}
    with refusing_what_is_not_finite():
        for path, changes in sources.changes():
            if not by_svd:
                _check_factors(combination_type, sources, path, changes)
            if combination_type in APART:
                layers[path] = _apart(changes, weights, recipe)
                continue
            own = combined(changes, weights, recipe, rank, None)
            layers[path] = (
                own if svd_clamp is None or not by_svd else own._replace(factors=_clamped(own.factors, svd_clamp))
            )
    return finish(model, adapter_name, sources, layers)


def _recipe(kind: str, density: float | None, majority: str) -> Recipe:
    if kind not in KINDS:
        raise ConfigError(f"combination_type {kind!r} is unknown{suggestion(str(kind), list(KINDS))}")
    if majority not in SIGN_METHODS:
        raise ConfigError(f"majority_sign_method must be 'total' or 'frequency'; got {majority!r}")
    if kind in ("svd", "cat", "linear"):
        return Recipe()
    check_density(f"density for combination_type={kind!r}", density)
    how = "random" if kind.startswith("dare") else "magnitude"
    if "ties" not in kind:
        return Recipe(how, cast(float, density), seed=None)
    elect = SIGN_METHODS[majority]
    return Recipe(how, cast(float, density), elect=elect, elect_weighted=False, normalise="count", seed=None)


def _check_svd(clamp: float | None, driver: str | None) -> None:
    if clamp is not None and not 0.5 < clamp <= 1:
        raise ConfigError(f"svd_clamp is a quantile above 0.5 and at most 1; got {clamp!r}; try 0.99")
    if driver not in DRIVERS:
        raise ConfigError(f"svd_driver must be None, 'gesvd', 'gesvdj' or 'gesvda'; got {driver!r}")


def _check_factors(kind: str, sources: Sources, path: str, changes: Sequence[Change | None]) -> None:
    """Raise ConfigError unless every change has factors, and of the same rank where A and B are combined apart."""
    ranks = {}
    for name, change in zip(sources.names, changes, strict=True):
        if change is not None and not isinstance(change.weight, Factors):
            raise ConfigError(
                f"combination_type={kind!r} takes the factors A and B, and adapter {name!r} at {path} is not these "
                "alone; take 'svd', which combines ΔW"
            )
        if change is not None:
            ranks[name] = cast(Factors, change.weight).rank
    if kind in APART and len(set(ranks.values())) > 1:
        raise ConfigError(
            f"combination_type={kind!r} adds factors of the same rank; at {path} they are {ranks}; take 'cat' or 'svd'"
        )


def _apart(changes: Sequence[Change | None], weights: Sequence[float], recipe: Recipe) -> Combined:
    factors = [None if change is None else cast(Factors, change.weight) for change in changes]
    scaled = [0.0 if own is None else w * own.scaling for own, w in zip(factors, weights, strict=True)]
    sizes = [math.sqrt(abs(value)) for value in scaled]
    signed = [math.copysign(size, value) for size, value in zip(sizes, scaled, strict=True)]
    a = mixed([own and own.a for own in factors], signed, recipe, None)
    b = mixed([own and own.b for own in factors], sizes, recipe, None)
    biases = [w * c.bias for c, w in zip(changes, weights, strict=True) if c is not None and c.bias is not None]
    made = Factors(a, b)
    return Combined(made, sum(biases[1:], biases[0]) if biases else None, 0.0, inner(made, made))


def _clamped(change: Factors, quantile: float) -> Factors:
    """Singular vectors have any sign, on which the quantile depends: here each of A's is largest where it is > 0."""
    a, b, _ = reduced(change, change.rank).factors
    signs = a.gather(2, a.abs().argmax(2, keepdim=True)).sign()
    a, b = a * signs, b * signs.mT
    most = _quantile(torch.cat([b.flatten(), a.flatten()]), quantile)
    return Factors(a.clamp(-most, most), b.clamp(-most, most))


def _quantile(values: Tensor, share: float) -> Tensor:
    """Between the two elements next to it; `torch.quantile` takes 16 million elements at most."""
    place = share * (len(values) - 1)
    ordered = values.sort().values
    return torch.lerp(ordered[math.floor(place)], ordered[math.ceil(place)], place - math.floor(place))
