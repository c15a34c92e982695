"""The factors of each layer's weight change: the method's own factors, or the best approximation of a given rank.

LoRA (also rsLoRA, and with a residual subtracted from the base: A and A₀ stacked), AdaLoRA and VeRA have s·BA as their
exact change. For every other method the factors approximate ΔW = W' − W, W' its merged weight, computed in float64.

Shapes: i in_features times kernel size, o out_features, r rank.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peftcore.adapter import Adapter
from peftcore.errors import ConfigError
from peftcore.injection.adapter_set import adapter_set
from peftcore.kernels.factors import Factors, LowRankReport, inner, svd_of_dense, svd_of_factors
from peftcore.merging.convertible import check_convertible
from peftcore.merging.sources import check_rank
from peftcore.merging.weight_changes import dense_change

SMALLEST = 1e-7
"""Singular values below this share of the largest are rounding errors."""


class _Approximation(NamedTuple):
    factors: Factors
    lost: float
    """‖ΔW − s·BA‖², squared Frobenius norm."""
    total: float
    """‖ΔW‖²."""


class Limits(NamedTuple):
    """Limits of a layer's rank; without any, the factors are exact."""

    rank: int | None
    """Largest rank (count)."""
    tolerance: float | None
    """Largest relative error in Frobenius norm."""

    @classmethod
    def of(cls, rank: int | float | None, tolerance: float | None) -> "Limits":
        """Return checked limits; a float as rank is a share of the squared singular values, as in `convert_to_lora`."""
        if isinstance(rank, float):
            if not 0 < rank <= 1:
                raise ConfigError(f"a rank that is a float is a share, above 0 and at most 1; got {rank}; try 0.95")
            share = math.sqrt(1 - rank)
            rank, tolerance = None, share if tolerance is None else min(share, tolerance)
        if rank is not None and (isinstance(rank, bool) or rank < 1):
            raise ConfigError(f"rank must be a positive integer, or a share in (0, 1]; got {rank}; try 16")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ConfigError(f"tolerance is a relative error, at least 0 and below 1; got {tolerance}; try 0.05")
        return cls(rank, tolerance)


@torch.no_grad()
def factors_by_layer(
    model: nn.Module,
    name: str,
    limits: Limits,
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[dict[str, Factors], LowRankReport]:
    """Compute {path: factors} of one adapter, and their report.

    A layer whose weight does not change has factors of rank 0.

    Args:
        model: the model with the adapter.
        name: the adapter.
        limits: limits of the ranks.
        progressbar: as in `convert_to_lora`.
        compile_kwargs: as in `convert_to_lora`.

    Raises:
        ConfigError, MergeError: as in `convert_to_lora`.
    """
    check_convertible(model, name)
    if limits.rank is not None:
        check_rank("rank", limits.rank, [adapter.base for adapter in adapter_set(model).adapters(name).values()])
    compute: Any = _layer_factors if compile_kwargs is None else torch.compile(_layer_factors, **compile_kwargs)
    adapters = adapter_set(model).adapters(name).items()
    layers: dict[str, _Approximation] = {}
    for path, adapter in tqdm(adapters, desc="Converting to LoRA", disable=not progressbar):
        layers[path] = compute(path, adapter, limits)
    report = LowRankReport.of(
        {path: layer.factors.rank for path, layer in layers.items()},
        {path: (layer.lost, layer.total) for path, layer in layers.items()},
    )
    return {path: layer.factors for path, layer in layers.items()}, report


def _layer_factors(path: str, adapter: Adapter, limits: Limits) -> _Approximation:
    exact = exact_factors(adapter)
    if exact is not None:
        return _reduced(exact, *limits)
    if limits.rank is None and limits.tolerance is None:
        raise ConfigError(
            f"{path}: {type(adapter).__name__} has no exact low-rank form; give rank=16, or tolerance=0.05 for the "
            "smallest rank with an error of at most 5 %"
        )
    dtype = next(adapter.parameters(), torch.empty(0)).dtype
    return _approximated(dense_change(adapter), dtype, *limits)


def exact_factors(adapter: Adapter) -> Factors | None:
    """Return the factors A (1, r, i) and B (1, o, r) of a layer's change; None for experts and other methods."""
    exact = adapter.exact_factors()
    return None if exact is None or len(exact.a) > 1 else exact._replace(a=exact.a.detach(), b=exact.b.detach())


def _reduced(factors: Factors, rank: int | None, tolerance: float | None) -> _Approximation:
    """Return factors of the rank that `rank` and `tolerance` ask for; factors that meet both are returned unchanged."""
    double = factors._replace(a=factors.a.double(), b=factors.b.double())
    unchanged = _Approximation(factors, 0.0, float(inner(double, double).clamp_min(0)))
    if tolerance is None and (rank is None or factors.rank <= rank):
        return unchanged
    svd = svd_of_factors(double, partial(_count, rank=rank, tolerance=tolerance))
    a, b, _ = svd.balanced()
    if a.shape[1] == factors.rank:
        return unchanged
    reduced = Factors(a.to(factors.a.dtype).contiguous(), b.to(factors.b.dtype).contiguous())
    return _Approximation(reduced, float(svd.lost), float(svd.total))


def _approximated(change: Tensor, dtype: torch.dtype, rank: int | None, tolerance: float | None) -> _Approximation:
    """Return the best factors, in the given type, of a dense ΔW (1, o, i) in float64."""
    svd = svd_of_dense(change, partial(_count, rank=rank, tolerance=tolerance))
    a, b, _ = svd.balanced()
    factors = Factors(a.to(dtype).contiguous(), b.to(dtype).contiguous())
    return _Approximation(
        factors, float((change - factors.b.double() @ factors.a.double()).square().sum()), float(svd.total)
    )


def _count(sigma: Tensor, rank: int | None, tolerance: float | None) -> int:
    """Return how many of the singular values (1, n) to keep; rounding errors are never kept."""
    values = sigma[0]
    count = int((values > SMALLEST * values[0]).sum()) if len(values) else 0
    if tolerance is not None and len(values):
        lost = values.square().flip(0).cumsum(0).flip(0).sqrt()  # lost[n]: error with only the first n singular values
        count = min(count, int((lost > tolerance * lost[0]).sum()))
    return count if rank is None else min(count, rank)
