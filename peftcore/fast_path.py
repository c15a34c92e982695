"""When a layer and its adapter are computed as one operation, and what layers of one input compute for one another.

The general path (base layer, then `after`) is always right. The fast one is taken by itself wherever it gives the same
numbers: the adapter is two factors, the base is frozen and does nothing but its product, and nobody listens to it.

The first layer that sees an input computes for the others that are expected to read it. They take what is theirs only
if they are called with that very tensor, unchanged; a layer that was not called so is left out from then on.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.composition.route import Columns, Route
from peftcore.composition.stacked import LONG, can_be_stacked, kept_stack, stacked_outputs, stretched_outputs
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


class Waitings(threading.local):
    """What waits in each thread, by the layer that it waits for."""

    def __init__(self) -> None:
        self.by_layer: dict[Any, Waiting] = {}


class Layer(Protocol):
    """What the fast path wants of an adapted layer."""

    base_layer: nn.Module
    path: str
    selection: Any
    sharing: list[Any]

    @property
    def base(self) -> BaseWeight:
        """The view on the base weight."""
        ...

    def acting(self) -> list[Adapter]:
        """Adapters that act and are not merged, in order."""
        ...

    def at_work(self) -> Mapping[str, Adapter]:
        """{name: adapter} of those that are not merged."""
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
    found: dict[Any, tuple[BaseWeight, LowRank]] = {}
    for other in _others(layer, dtype, x):
        acting = other.acting()
        theirs = acting[0].low_rank() if len(acting) == 1 else None
        if theirs is not None and theirs.dropout == low_rank.dropout:
            found[other] = other.base, theirs
    y, *rest = low_rank_linears(x.to(dtype), [(base, low_rank), *found.values()])
    _give(layer, x, zip(found, rest, strict=True))
    return y


def stacked(layer: Layer, x: Tensor, route: Route | None = None) -> Tensor | None:
    """The base layer and all adapters that act in two products, without gradients; None where that is not exact.

    route: which rows are whose; None for adapters that all act in every row, one on top of another.
    """
    if torch.is_grad_enabled() or not only_computes(layer.base_layer):
        return None
    base = layer.base
    dtype = base.computes_in(x)
    if dtype is None:
        return None
    own = _acting(layer, route)
    together = {layer: own}
    if route is None or not route.has_gates:  # a gate looks at one layer's own adapters
        together |= {other: theirs for other in _others(layer, dtype, x) if (theirs := _acting(other, route))}
    kept = layer.selection.stacks
    found = kept_stack(kept, layer, [tuple(acting.values()) for acting in together.values()], dtype)
    if found is None and len(together) > 1:
        together = {layer: own} | {other: t for other, t in list(together.items())[1:] if can_be_stacked(t.values())}
        found = kept_stack(kept, layer, [tuple(acting.values()) for acting in together.values()], dtype)
    if found is None:
        return None
    bases, runs, mask = [each.base for each in together], None, None
    names = tuple(name for acting in together.values() for name in acting)
    if route is not None:
        runs = route.runs(x, layer.path)
        if runs is None or len(own) < 2 or x.shape[:-1].numel() < LONG * len(runs):
            runs, mask = None, route.mask(x, layer.path, Columns(names, found.ranks, own), dtype)
    if runs is None:
        y, *rest = stacked_outputs(x.to(dtype), bases, found, mask)
    else:
        y, *rest = stretched_outputs(x.to(dtype), bases, found, names, runs)
    _give(layer, x, zip(list(together)[1:], rest, strict=True))
    return y


def _acting(layer: Layer, route: Route | None) -> dict[str, Adapter]:
    at_work = layer.at_work()
    names = layer.selection.acting if route is None else route.names
    return {name: at_work[name] for name in names if name in at_work}


def given(layer: Layer, x: Tensor) -> Tensor | None:
    """What another layer has computed for this one, if it was from this very x; to be asked first."""
    waiting: MutableMapping[Any, Waiting] = layer.selection.waiting.by_layer
    if waiting and (left := waiting.pop(layer, None)) is not None:
        if left.x is x and left.version == _version(x):
            return left.y
        _stop_giving(left, layer)
    return None


def _give(layer: Layer, x: Tensor, outputs: Iterable[tuple[Any, Tensor]]) -> None:
    for other, y in outputs:
        layer.selection.waiting.by_layer[other] = Waiting(layer, x, _version(x), y)


def _others(layer: Layer, dtype: torch.dtype, x: Tensor) -> Iterator[Any]:
    """Layers for which this one can compute, since they are expected to be called with the same x.

    A replica that DataParallel made has none: it knows the neighbours of its original, not its own.
    """
    if "_is_replica" in vars(layer):
        return
    for other in list(layer.sharing):
        if (left := layer.selection.waiting.by_layer.pop(other, None)) is not None:
            _stop_giving(left, other)
        elif only_computes(other.base_layer) and other.base.computes_in(x) == dtype:
            yield other


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


def contiguous_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A pre-hook for output heads, which read the last token of each row: PyTorch multiplies such a slice by a frozen
    weight row by row, and copies the weight for each."""
    x = args[0] if args else None
    return None if not isinstance(x, Tensor) or x.is_contiguous() else (x.contiguous(), *args[1:])


def only_computes(layer: nn.Module) -> bool:
    """Whether calling the layer does its own arithmetic alone, and no transform or trace of it is being made."""
    before = layer._forward_pre_hooks
    return not (
        layer._forward_hooks
        or (before and any(hook is not contiguous_input for hook in before.values()))
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__  # accelerate replaces it on the instance
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
