"""The factors of each layer's weight change: the method's own factors, or the best approximation of a given rank.

LoRA (also rsLoRA, and with a residual subtracted from the base: A and A₀ stacked), AdaLoRA and VeRA have s·BA as their
exact change. For every other method the factors approximate ΔW = W' − W, W' its merged weight, computed in float64.

Shapes: i in_features times kernel size, o out_features, r rank.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.errors import ConfigError, MergeError
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.merge import check_mergeable
from peftcore.kernels.factors import Factors, LowRankReport, inner, svd_of_dense, svd_of_factors
from peftcore.merging.weight_changes import dense_change

KINDS = ("linear", "conv", "embedding")
"""Kinds of layers whose weight a LoRA can change by two factors."""
SMALLEST = 1e-7
"""Singular values below this share of the largest are rounding errors."""


class _Approximation(NamedTuple):
    factors: Factors
    lost: float
    """‖ΔW − s·BA‖², squared Frobenius norm."""
    total: float
    """‖ΔW‖²."""


@torch.no_grad()
def factors_by_layer(
    model: nn.Module, name: str, rank: int | None, tolerance: float | None
) -> tuple[dict[str, Factors], LowRankReport]:
    """Compute {path: factors} of one adapter, and their report; see `convert_to_lora` for rank, tolerance and errors.

    A layer whose weight does not change has factors of rank 0.
    """
    _check_limits(rank, tolerance)
    check_convertible(model, name)
    layers: dict[str, _Approximation] = {}
    for path, adapter in adapter_set(model).adapters(name).items():
        exact = exact_factors(adapter)
        if exact is not None:
            layers[path] = _reduced(exact, rank, tolerance)
        elif rank is None and tolerance is None:
            method = type(adapter).__name__
            raise ConfigError(
                f"{path}: {method} has no exact low-rank form; give rank=16, or tolerance=0.05 for the smallest rank "
                "with an error of at most 5 %"
            )
        else:
            layers[path] = _approximated(dense_change(adapter), rank, tolerance)
    report = LowRankReport.of(
        {path: layer.factors.rank for path, layer in layers.items()},
        {path: (layer.lost, layer.total) for path, layer in layers.items()},
    )
    return {path: layer.factors for path, layer in layers.items()}, report


def exact_factors(adapter: Adapter) -> Factors | None:
    """Return the factors A (1, r, i) and B (1, o, r) of a layer's change; None for experts and other methods."""
    own = adapter.exact_factors()
    return None if own is None or len(own.a) > 1 else own._replace(a=own.a.detach(), b=own.b.detach())


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


def _approximated(change: Tensor, rank: int | None, tolerance: float | None) -> _Approximation:
    """Return the best factors, in float32, of a dense ΔW (1, o, i) in float64."""
    svd = svd_of_dense(change, partial(_count, rank=rank, tolerance=tolerance))
    a, b, _ = svd.balanced()
    factors = Factors(a.float().contiguous(), b.float().contiguous())
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


def check_convertible(model: nn.Module, name: str) -> None:
    """Raise ConfigError or MergeError, naming the layer, if an adapter does more than add ΔW to weights."""
    adapters = adapter_set(model)
    adapters.require(name)
    config = adapters.configs[name]
    if name in adapters.prompts:
        raise ConfigError(f"{name!r} is a prompt ({config.peft_type}), which no LoRA can replace; use it as it is")
    if name in adapters.merged:
        raise MergeError(f"adapter {name!r} is merged into the base; call unmerge_adapter first")
    if adapters.replication is not None:
        raise ConfigError("layer_replication adds layers to the model, which plain LoRA does not; merge it instead")
    for path, adapter in adapters.adapters(name).items():
        if adapter.base.kind not in KINDS:
            raise ConfigError(
                f"{path} is a {adapter.base.kind}, which plain LoRA does not change; merge the adapter instead"
            )
        if adapter.bias_change() is not None:
            raise ConfigError(
                f"{path}: {config.peft_type} changes the layer's bias too, which plain LoRA does not; merge the "
                "adapter instead"
            )
    check_mergeable(model, [name])


def _check_limits(rank: int | None, tolerance: float | None) -> None:
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be a positive integer; got {rank}; try 16")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is a relative error, at least 0 and below 1; got {tolerance}; try 0.05")
