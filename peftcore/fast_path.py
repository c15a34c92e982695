"""When a layer and its adapter are computed as one operation, and what layers of one input compute for one another.

The general path (base layer, then `after`) is always right. The fast one is taken by itself wherever it gives the same
numbers: the adapter is two factors, the base is frozen and does nothing but its product, and nobody listens to it.

The first layer that sees an input computes for the others that are expected to read it. They take what is theirs only
if they are called with that very tensor, unchanged; a layer that was not called so is left out from then on.
"""

from collections.abc import MutableMapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.low_rank import LowRank, low_rank_linears


class Waiting(NamedTuple):
    """What the first layer that saw an input has computed for another one."""

    giver: Any
    """The first layer."""
    x: Tensor
    """The input itself, as the first layer got it."""
    version: int
    """How often it had been changed in place by then."""
    y: Tensor
    """The other's output."""


class _Selection(Protocol):
    waiting: MutableMapping[Any, Waiting]


class Layer(Protocol):
    """What the fast path wants of an adapted layer."""

    base_layer: nn.Module
    selection: Any
    sharing: list[Any]

    @property
    def base(self) -> BaseWeight:
        """The view on the base weight."""
        ...

    def acting(self) -> list[Adapter]:
        """Adapters that act and are not merged, in order."""
        ...


def fused(layer: Layer, adapter: Adapter, x: Tensor) -> Tensor | None:
    """The base layer and the first of its adapters as one operation, or None where that would not be exact."""
    if not only_computes(layer.base_layer):
        return None
    base = layer.base
    dtype = base.computes_in(x)
    low_rank = None if dtype is None else adapter.low_rank()
    if dtype is None or low_rank is None:
        return None
    waiting: MutableMapping[Any, Waiting] = layer.selection.waiting
    if waiting and (given := waiting.pop(layer, None)) is not None:
        if given.x is x and given.version == _version(x):
            return given.y
        _stop_giving(given, layer)
    others = _others(layer, low_rank, dtype, x)
    y, *rest = low_rank_linears(x.to(dtype), [(base, low_rank), *others.values()])
    for other, theirs in zip(others, rest, strict=True):
        waiting[other] = Waiting(layer, x, _version(x), theirs)
    return y


def _others(layer: Layer, own: LowRank, dtype: torch.dtype, x: Tensor) -> dict[Any, tuple[BaseWeight, LowRank]]:
    """Layers for which this one computes, since they are expected to be called with the same x.

    A replica that DataParallel made has none: it knows the neighbours of its original, not its own.
    """
    if "_is_replica" in vars(layer):
        return {}
    found: dict[Any, tuple[BaseWeight, LowRank]] = {}
    for other in list(layer.sharing):
        if (left := layer.selection.waiting.pop(other, None)) is not None:
            _stop_giving(left, other)
            continue
        acting = other.acting()
        if len(acting) == 1 and only_computes(other.base_layer) and other.base.computes_in(x) == dtype:
            theirs = acting[0].low_rank()
            if theirs is not None and theirs.dropout == own.dropout:
                found[other] = other.base, theirs
    return found


def _stop_giving(left: Waiting, layer: Any) -> None:
    """Have a layer left out, because it has not asked for what it was given."""
    left.giver.sharing = [other for other in left.giver.sharing if other is not layer]


def forget(waiting: MutableMapping[Any, Waiting]) -> None:
    """Let go of what the last forward of the model has left: memory, and a guess that did not come true."""
    for layer, left in waiting.items():
        _stop_giving(left, layer)
    waiting.clear()


def _version(x: Tensor) -> int:
    """How often x has been changed in place; inference mode does not count."""
    return 0 if x.is_inference() else x._version


def only_computes(layer: nn.Module) -> bool:
    """Whether calling the layer does its own arithmetic alone, and no transform or trace of it is being made."""
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__  # accelerate replaces it on the instance
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
