"""When a layer and its adapters are computed as one operation.

The general path (base layer, then `after`) is always right. The fast one is taken by itself wherever it gives the same
numbers: the adapters are two factors each, the base is frozen and does nothing but its product, and nobody listens to
it. Without gradients, how a layer computes is remembered until something of it changes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.composition.route import Blocks, Columns, Mask, Route, RoutedLayer
from peftcore.composition.stacked import (
    LONG,
    MANY,
    Wanted,
    batched_outputs,
    can_be_stacked,
    kept_stack,
    stacked_outputs,
    stretched_outputs,
)
from peftcore.kernels.low_rank import LowRankBranch, low_rank_linears
from peftcore.layers.shared_inputs import give, is_replica, neighbours


class Layer(RoutedLayer, Protocol):
    """What the fast path wants of an adapted layer."""

    base_layer: nn.Module
    selection: Any
    adapters: Any
    merged: tuple[str, ...]
    training: bool

    @property
    def base(self) -> BaseWeight:
        """The view on the base weight."""
        ...

    def acting(self) -> list[Adapter]:
        """Adapters that act and are not merged, in order."""
        ...

    def unmerged(self) -> Mapping[str, Adapter]:
        """{name: adapter} of those that are not merged."""
        ...


def fused(layer: Layer, adapter: Adapter, x: Tensor) -> Tensor | None:
    """The base layer and the first of its adapters as one operation, or None where that would not be exact."""
    dtype = None if is_traced() or not has_no_hooks(layer.base_layer) else layer.base.compute_dtype(x)
    low_rank = None if dtype is None else adapter.low_rank()
    if dtype is None or low_rank is None:
        return None
    found: dict[Any, tuple[BaseWeight, LowRankBranch]] = {}
    for other in _computing(neighbours(layer, x), x, dtype):
        acting = other.acting()
        theirs = acting[0].low_rank() if len(acting) == 1 else None
        if theirs is not None and theirs.dropout == low_rank.dropout:
            found[other] = other.base, theirs
    y, *rest = low_rank_linears(x.to(dtype), [(layer.base, low_rank), *found.values()])
    give(layer, x, zip(found, rest, strict=True))
    return y


class Member(NamedTuple):
    """A layer for which a plan holds, and what it looked like."""

    layer: Any
    base: BaseWeight
    changes: int
    """Of its adapters."""
    merged: tuple[str, ...]
    training: bool

    def is_as_it_was(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether it still computes the same, and in this type for an x like this."""
        layer, base = self.layer, self.base
        return (
            layer.adapters.changes == self.changes
            and layer.merged == self.merged
            and layer.training == self.training
            and layer.base is base
            and has_no_hooks(base.layer)
            and base.compute_dtype(x) == dtype
        )


class Plan(NamedTuple):
    """How a layer computes without gradients for itself and its neighbours, under certain acting adapters."""

    members: list[Member]
    """The layer itself first."""
    neighbours: Sequence[Any]
    """All that were expected to read the same input."""
    wanted: Wanted
    columns: Columns
    mask: Mask | None
    """None also where it is another one in each forward."""
    blocks: Blocks | None
    """To be taken before the mask."""

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether nothing has changed since."""
        return (
            neighbours(layer, x) is self.neighbours
            and x.device == self.wanted.device
            and all(member.is_as_it_was(x, self.wanted.dtype) for member in self.members)
        )


def stacked(layer: Layer, x: Tensor, route: Route | None = None) -> Tensor | None:
    """The base layer and all adapters that act in two products, without gradients; None where that is not exact.

    route: which rows are whose; None for adapters that all act in every row, one on top of another.
    """
    if torch.is_grad_enabled() or is_traced():
        return None
    selection = layer.selection
    plans = selection.plans_of(selection.acting) if route is None else route.plans
    plan: Plan | None = plans.get(layer)
    stack = kept_stack(_keep(layer), layer, plan.wanted) if plan is not None and plan.holds(layer, x) else None
    if plan is None or stack is None or stack.ranks != plan.columns.ranks:  # of adapters that train, ranks may change
        plan = _plan(layer, x, route)
        stack = None if plan is None else kept_stack(_keep(layer), layer, plan.wanted)
        if plan is None or stack is None:
            return None
        if not is_replica(layer):
            plans[layer] = plan
    mask, runs = plan.mask, None
    if route is not None:
        route.check_layer(x, layer)
        tokens = x.shape[:-1].numel()
        if 0 < LONG * route.stretches <= tokens and len(plan.columns.adapters) > 1:
            runs = route.runs(tokens)
        elif route.depends_on_tokens:
            mask = route.mask(x, layer.path, plan.columns, plan.wanted.dtype)
    inputs, bases = x.to(plan.wanted.dtype), [member.base for member in plan.members]
    if runs is not None:
        y, *rest = stretched_outputs(inputs, bases, stack, plan.columns.names, runs)
    elif plan.blocks is not None:
        y, *rest = batched_outputs(inputs, bases, stack, plan.blocks)
    else:
        y, *rest = stacked_outputs(inputs, bases, stack, mask)
    give(layer, x, zip((member.layer for member in plan.members[1:]), rest, strict=True))
    return y


def _plan(layer: Layer, x: Tensor, route: Route | None) -> Plan | None:
    """What `stacked` does at a layer; None where it is nothing for it."""
    dtype = layer.base.compute_dtype(x) if has_no_hooks(layer.base_layer) else None
    if dtype is None:
        return None
    own, around = _acting(layer, route), neighbours(layer, x)
    together = {layer: own}
    if route is None or not route.has_gates:  # a gate looks at one layer's own adapters
        others = _computing(around, x, dtype)
        together |= {other: theirs for other in others if (theirs := _acting(other, route))}

    def wanted() -> Wanted:
        return Wanted(dtype, x.device, layer.training, tuple(tuple(acting.values()) for acting in together.values()))

    stack = kept_stack(_keep(layer), layer, wanted())
    if stack is None and len(together) > 1:
        alike = [other for other in together if other is layer or can_be_stacked(together[other].values())]
        together = {other: together[other] for other in alike}
        stack = kept_stack(_keep(layer), layer, wanted())
    if stack is None:
        return None
    members = [Member(each, each.base, each.adapters.changes, each.merged, each.training) for each in together]
    names = tuple(name for acting in together.values() for name in acting)
    columns = Columns(names, stack.ranks, own)
    fixed = route is not None and not route.depends_on_tokens
    mask = route.mask(x, layer.path, columns, dtype) if route is not None and fixed else None
    many = stack.batched and len(own) >= MANY and dtype.itemsize > 2
    alike = many and all(acting.keys() == own.keys() for acting in together.values())
    blocks = route.blocks(columns, x.device) if route is not None and alike else None
    return Plan(members, around, wanted(), columns, mask, blocks)


def _keep(layer: Layer) -> dict[Any, Any]:
    """Where stacks are kept: those of a replica, which lives for one forward, nowhere."""
    return {} if is_replica(layer) else layer.selection.stacks


def _computing(layers: Iterable[Any], x: Tensor, dtype: torch.dtype) -> list[Any]:
    """Those that do their own arithmetic alone, in this type for an x like this."""
    return [each for each in layers if has_no_hooks(each.base_layer) and each.base.compute_dtype(x) == dtype]


def _acting(layer: Layer, route: Route | None) -> dict[str, Adapter]:
    unmerged = layer.unmerged()
    names = layer.selection.acting if route is None else route.names
    return {name: unmerged[name] for name in names if name in unmerged}


def contiguous_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A pre-hook for output heads, which read the last token of each row: PyTorch multiplies such a slice by a frozen
    weight row by row, and copies the weight for each."""
    x = args[0] if args else None
    return None if not isinstance(x, Tensor) or x.is_contiguous() else (x.contiguous(), *args[1:])


def has_no_hooks(layer: nn.Module) -> bool:
    """Whether calling the layer does its own arithmetic alone."""
    before = layer._forward_pre_hooks
    return not (
        layer._forward_hooks
        or (before and any(hook is not contiguous_input for hook in before.values()))
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__  # accelerate replaces it on the instance
    )


def is_traced() -> bool:
    """Whether a transform or a trace of what runs now is being made."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
