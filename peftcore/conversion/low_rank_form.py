"""An adapter's change of its weight as two factors: by algebra where the method has them, else the nearest ones.

LoRA (also rsLoRA, and with a start taken out of the base: A and A₀ stacked), AdaLoRA and VeRA are s·BA as they are.
Of every other method the factors are those of ΔW = W' − W, W' its merged weight, computed in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.conversion.factors import Factors, Shortened, factorised, shortened
from peftcore.errors import ConfigError, MergeError
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.merge import check_mergeable

KINDS = ("linear", "conv", "embedding")
"""Kinds of layers that have a weight which two factors can change."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion to LoRA kept. Errors are relative, ‖ΔW − s·BA‖ / ‖ΔW‖ (Frobenius); 0 where it is exact."""

    ranks: dict[str, int]
    """{path: rank}; a layer that is not changed has 0, and is no target."""
    errors: dict[str, float]
    """{path: error of the layer}"""
    error: float
    """Of all layers together."""


@torch.no_grad()
def low_rank_forms(
    model: nn.Module, name: str, rank: int | None, tolerance: float | None
) -> tuple[dict[str, Factors], Conversion]:
    """({path: factors of rank 0 or more}, what they miss) of one adapter, which stays as it is.

    Raises ConfigError or MergeError for an adapter that no LoRA can stand for.
    """
    _check_limits(rank, tolerance)
    check_convertible(model, name)
    found: dict[str, Shortened] = {}
    for path, adapter in adapter_set(model).adapters(name).items():
        exact = exact_factors(adapter)
        if exact is not None:
            found[path] = shortened(exact, rank, tolerance)
        elif rank is None and tolerance is None:
            method = type(adapter).__name__
            raise ConfigError(
                f"{path}: {method} has no low-rank form of its own here; give rank=16, or tolerance=0.05 for the least "
                "rank within 5 % of its change"
            )
        else:
            found[path] = factorised(weight_change(adapter).flatten(1), rank, tolerance)
    return {path: layer.factors for path, layer in found.items()}, _report(found)


def exact_factors(adapter: Adapter) -> Factors | None:
    """The change of a weight, flattened to (o, i), as two factors in the adapter's own type; None where it has none."""
    own = adapter.exact_factors()
    return None if own is None or len(own.a) > 1 else Factors(own.a[0].detach(), own.b[0].detach(), own.scaling)


def weight_change(adapter: Adapter) -> Tensor:
    """ΔW in canonical orientation, in float64, of the adapter alone on its unmerged base."""
    weight = adapter.base.read_unmerged().double()
    return adapter.merged_weight(weight) - weight


def check_convertible(model: nn.Module, name: str) -> None:
    """Raise ConfigError or MergeError, naming the layer, where an adapter does more than change weights by a sum."""
    adapters = adapter_set(model)
    adapters.require(name)
    config = adapters.configs[name]
    if name in adapters.prompts:
        raise ConfigError(f"{name!r} is a prompt ({config.peft_type}), which no LoRA can stand for; keep it as it is")
    if name in adapters.merged:
        raise MergeError(f"adapter {name!r} is merged into the base; call unmerge_adapter first")
    if adapters.replication is not None:
        raise ConfigError("layer_replication makes a deeper model, which a plain LoRA does not; merge it instead")
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


def _report(found: dict[str, Shortened]) -> Conversion:
    whole = math.hypot(*(layer.norm for layer in found.values()))
    return Conversion(
        ranks={path: layer.factors.rank for path, layer in found.items()},
        errors={path: layer.missing / layer.norm if layer.norm else 0.0 for path, layer in found.items()},
        error=math.hypot(*(layer.missing for layer in found.values())) / whole if whole else 0.0,
    )
