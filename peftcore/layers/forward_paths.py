"""The one place that decides how an adapter layer computes its output: general, added, fused or stacked.

    general   the base layer, then `before` and `after` of each adapter; right for every method and every layer
    decoding  the same with few calls (`peftcore.layers.decoding`); one chain of adapters, few tokens, without gradients
              and in evaluation mode
    fused     base and low-rank adapters as one operation (`peftcore.kernels.low_rank`); for training and long inputs
    stacked   base and all low-rank adapters in two products, or each adapter for its own long runs of tokens
              (`peftcore.composition.stacked`); mixed batches, without gradients

The last three give the numbers of the general path, and apply only if the base layer has no hook that would be
skipped. "Fused" and "stacked" need adapters that are two low-rank factors, and a frozen base weight. "Decoding" and
"fused" read the adapters' parameters in every forward, so no change of a weight can be missed.

A stacked layer remembers its `Plan`. Each forward checks that the plan still holds before it is used again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.composition.route import Blocks, Columns, Mask, Route
from peftcore.composition.stacked import (
    LONG_RUN,
    MANY_ADAPTERS,
    Stacked,
    StackSpec,
    batched_outputs,
    branches_by_name,
    can_be_stacked,
    current_stack,
    names_with_kept,
    outputs_by_run,
    stacked_outputs,
)
from peftcore.kernels.dropout_masks import get_dropout_masks
from peftcore.kernels.low_rank import LowRankBranch, low_rank_linears
from peftcore.layers.composed import ascend, composed_output, descend
from peftcore.layers.decoding_by_row import decoded_by_row
from peftcore.layers.shared_inputs import cache_outputs, cached_output, is_replica, siblings_of

if TYPE_CHECKING:
    from peftcore.layers.adapter_layer import AdapterLayer


def layer_output(layer: "AdapterLayer", x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the output of a layer with its adapters: of a fast path if one applies, else of the general path.

    Args:
        layer: the adapter layer that is called.
        x: its input (..., in_features); token ids for an embedding.
        args: further positional arguments for the base layer; with any, only the general path applies.
        kwargs: further keyword arguments for the base layer, likewise.

    Returns:
        The output (..., out_features).
    """
    in_effect: Any = layer.selection.now
    chain = in_effect.chain if isinstance(in_effect, Route) else in_effect  # None if rows have different adapters
    y = None if args or kwargs or is_traced() else _fast_output(layer, x, in_effect, chain)
    if y is not None:
        return y
    if chain is None:
        y = composed_output(layer, in_effect, x, args, kwargs)
    else:
        y = layer.chain_output(layer.in_order(chain), x, *args, **kwargs)
    return y


def _fast_output(layer: "AdapterLayer", x: Tensor, in_effect: Any, chain: tuple[str, ...] | None) -> Tensor | None:
    """Return the output from a sibling layer or by a fast path; None if none of them applies."""
    y = cached_output(layer, x, in_effect) if layer.selection.cache.outputs else None
    if y is not None:
        return y
    if chain is None:
        y = None if torch.is_grad_enabled() else _mixed(layer, in_effect, x)
    else:
        adapters = layer.chain(chain)
        y = _fused(layer, adapters, x) if adapters else None
    return y


# -- fused: for training -------------------------------------------------------------------------------------------


def _fused(layer: "AdapterLayer", adapters: Sequence[Adapter], x: Tensor) -> Tensor | None:
    """Return the output with base and first adapter as one operation; None if that does not apply.

    The outputs of the siblings are computed in the same operation and cached. With dropout and PyTorch's masks, each
    layer must draw its own mask when the model calls the layer, so its siblings are left out.
    """
    first, *later = adapters
    base = layer.base  # also moves the adapters to the base layer that is in place now
    if not has_no_hooks(base.layer) or any(adapter.weight_space_forward for adapter in later):
        return None
    inputs, x = descend(later, x) if later else ((), x)
    dtype = base.compute_dtype(x)
    low_rank = None if dtype is None else first.low_rank()
    if dtype is None or low_rank is None:
        return None
    together: dict[Any, tuple[BaseWeight, LowRankBranch]] = {}
    own_mask = low_rank.dropout and get_dropout_masks() == "pytorch"
    if not own_mask and (layer.siblings or layer.selection.recomputed is not None):
        for sibling in _plain_layers(siblings_of(layer, x), x, dtype):
            chain = sibling.in_effect()
            factors = chain[0].low_rank() if len(chain) == 1 else None
            if factors is not None and factors.dropout == low_rank.dropout:
                together[sibling] = sibling.base, factors
    y, *outputs = low_rank_linears(x.to(dtype), [(base, low_rank), *together.values()])
    if together:
        cache_outputs(layer, x, zip(together, outputs, strict=True))
    return ascend(later, inputs, y) if later else y


# -- stacked: mixed batches, without gradients ----------------------------------------------------------------------


def _mixed(layer: "AdapterLayer", route: Route, x: Tensor) -> Tensor | None:
    """Return the output for rows with different adapters; None if no adapter is in effect, or if one is not low-rank.

    The outputs of the siblings are cached.
    """
    y = None if has_global_hooks() else decoded_by_row(layer, route, x)
    if y is not None:
        return y
    if 0 < LONG_RUN * route.run_count <= x.shape[:-1].numel():
        return _by_run(layer, route, x)
    return _stacked(layer, route, x)


def _by_run(layer: "AdapterLayer", route: Route, x: Tensor) -> Tensor | None:
    """Return the output for long runs of tokens, each with one composition; None if that does not apply."""
    dtype = layer.base.compute_dtype(x) if has_no_hooks(layer.base_layer) else None
    if dtype is None or not layer.in_order(route.names):
        return None
    candidates = [layer, *_plain_layers(siblings_of(layer, x), x, dtype)]
    branches = {each: branches_by_name(each.unmerged_among(route.names)) for each in candidates}
    if branches[layer] is None:
        return None
    together = {each: found for each, found in branches.items() if found}
    layer.check_rows(x, route)
    layers = [(each.base, found) for each, found in together.items()]
    y, *outputs = outputs_by_run(x.to(dtype), layers, route.runs(x.shape[:-1].numel()))
    cache_outputs(layer, x, zip(list(together)[1:], outputs, strict=True))
    return y


class Member(NamedTuple):
    """One layer of a plan, and the state of that layer when the plan was made."""

    layer: Any
    base: BaseWeight
    changes: int
    """`NamedModules.changes` of the layer's adapters."""
    merged: tuple[str, ...]
    training: bool

    def is_current(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Return True if the layer is as it was when the plan was made, and computes in `dtype` for an input like x."""
        layer, base = self.layer, self.base
        return (
            layer.adapters.changes == self.changes
            and layer.merged_names == self.merged
            and layer.training == self.training
            and layer.base is base
            and has_no_hooks(base.layer)
            and base.compute_dtype(x) == dtype
        )


class Plan(NamedTuple):
    """The stacked computation of a layer and its siblings, for one set of adapters in effect."""

    members: list[Member]
    """The layer itself, then the siblings that are computed with it."""
    siblings: Sequence[Any]
    """All layers that were expected to read the same input, members or not."""
    dtype: torch.dtype
    """The type in which the layers compute."""
    spec: StackSpec
    columns: Columns
    mask: Mask | None
    """None if no mask is needed, or if the mask must be recomputed in every forward pass."""
    blocks: Blocks | None
    """Rows grouped by adapter; if given, used in place of the mask."""

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Return True if no layer of the plan has changed since the plan was made."""
        return (
            siblings_of(layer, x) is self.siblings
            and x.device == self.spec.device
            and all(member.is_current(x, self.dtype) for member in self.members)
        )

    def stack(self, layer: Any) -> Stacked | None:
        """Return the up-to-date stack; None if there is none, or if ranks have changed (adapters that train)."""
        stack = current_stack(_stack_cache(layer), layer, self.spec)
        return stack if stack is not None and stack.ranks == self.columns.ranks else None


def _stacked(layer: "AdapterLayer", route: Route, x: Tensor) -> Tensor | None:
    """Return the output by the stacks of all adapters; None if that does not apply.

    The plan of an earlier forward is used if it still holds.
    """
    plan: Plan | None = route.plans.get(layer)
    stack = plan.stack(layer) if plan is not None and plan.holds(layer, x) else None
    if plan is None or stack is None:
        # any method is tried: `_make_plan` returns None if an adapter is not exactly two factors
        plan = _make_plan(layer, x, route) if layer.in_order(route.names) else None
        stack = None if plan is None else plan.stack(layer)
        if plan is None or stack is None:
            return None
        if not is_replica(layer):
            route.plans[layer] = plan
    layer.check_rows(x, route)
    inputs, bases = x.to(plan.dtype), [member.base for member in plan.members]
    if plan.blocks is not None:
        y, *outputs = batched_outputs(inputs, bases, stack, plan.blocks)
    else:
        mask = plan.mask
        if route.depends_on_tokens:
            mask = route.mask(x, layer.path, plan.columns, plan.dtype)
        y, *outputs = stacked_outputs(inputs, bases, stack, mask)
    cache_outputs(layer, x, zip((member.layer for member in plan.members[1:]), outputs, strict=True))
    return y


def _make_plan(layer: "AdapterLayer", x: Tensor, route: Route) -> Plan | None:
    """Return a plan for the layer and its siblings; None if stacking does not apply to this layer."""
    dtype = layer.base.compute_dtype(x) if has_no_hooks(layer.base_layer) else None
    if dtype is None:
        return None
    if not route.depends_on_tokens:
        names = names_with_kept(_stack_cache(layer), layer, route.names)
        if names != route.names and (plan := _plan_for(layer, x, route, dtype, names)) is not None:
            return plan
    return _plan_for(layer, x, route, dtype, route.names)


def _plan_for(
    layer: "AdapterLayer", x: Tensor, route: Route, dtype: torch.dtype, names: tuple[str, ...]
) -> Plan | None:
    """Return a plan that stacks the adapters `names`, perhaps more than the route uses; None if that does not apply."""
    own, siblings = layer.unmerged_among(names), siblings_of(layer, x)
    together: dict[Any, Mapping[str, Adapter]] = {layer: own}
    if not route.has_gates:  # a gate reads the adapters of one layer only
        others = _plain_layers(siblings, x, dtype)
        together |= {other: adapters for other in others if (adapters := other.unmerged_among(names))}

    blocks = _blocks(route, list(together.values()), x.device, dtype)

    def spec() -> StackSpec:
        # for a row or a few by adapter, CPUs multiply in float32 several times faster than in 16 bits
        wide = torch.promote_types(dtype, torch.float32) if blocks is not None and x.device.type == "cpu" else dtype
        adapters = tuple(tuple(by_name.values()) for by_name in together.values())
        return StackSpec(wide, x.device, layer.training, adapters, names)

    stack = current_stack(_stack_cache(layer), layer, spec())
    if stack is None and len(together) > 1:
        stackable = [other for other in together if other is layer or can_be_stacked(together[other].values())]
        together = {other: together[other] for other in stackable}
        stack = current_stack(_stack_cache(layer), layer, spec())
    if stack is not None and blocks is not None and not stack.batched:  # ranks differ
        blocks = None
        stack = current_stack(_stack_cache(layer), layer, spec())
    if stack is None:
        return None
    members = [Member(each, each.base, each.adapters.changes, each.merged_names, each.training) for each in together]
    columns = Columns(tuple(name for by_name in together.values() for name in by_name), stack.ranks, own)
    mask = None if route.depends_on_tokens or blocks is not None else route.mask(x, layer.path, columns, dtype)
    return Plan(members, siblings, dtype, spec(), columns, mask, blocks)


def _blocks(
    route: Route, adapters: Sequence[Mapping[str, Adapter]], device: torch.device, dtype: torch.dtype
) -> Blocks | None:
    """Return the rows grouped by adapter; None if that does not apply, or if it does not pay.

    Args:
        route: the compositions of the rows.
        adapters: {name: adapter} of each layer that is computed together.
        device: where the layers compute.
        dtype: the type in which the layers compute.
    """
    own = adapters[0]
    if len(own) < MANY_ADAPTERS or (device.type != "cpu" and dtype.itemsize < 4):
        return None
    return route.blocks(own, device) if all(other.keys() == own.keys() for other in adapters) else None


def _stack_cache(layer: Any) -> dict[Any, Any]:
    """Return the cache of stacks; an empty one for a DataParallel replica, which lives for one forward."""
    return {} if is_replica(layer) else layer.selection.stacks


# -- conditions of the two fast paths ------------------------------------------------------------------------------


def _plain_layers(layers: Iterable[Any], x: Tensor, dtype: torch.dtype) -> list[Any]:
    """Return the layers without hooks whose base computes a plain matrix product in `dtype` for an input like x."""
    return [each for each in layers if has_no_hooks(each.base_layer) and each.base.compute_dtype(x) == dtype]


def contiguous_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make the input of an output head contiguous, as a forward pre-hook.

    Models give the head the last token of each row, which is a strided slice. PyTorch multiplies such a slice by a
    frozen weight row by row, and copies the weight for each row.
    """
    x = args[0] if args else None
    return None if not isinstance(x, Tensor) or x.is_contiguous() else (x.contiguous(), *args[1:])


def has_no_hooks(layer: nn.Module) -> bool:
    """Return True if calling the layer runs its own forward and nothing else."""
    before = layer._forward_pre_hooks
    return not (
        layer._forward_hooks
        or (before and any(hook is not contiguous_input for hook in before.values()))
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__  # accelerate replaces it on the instance
        or has_global_hooks()
    )


def has_global_hooks() -> bool:
    """Return True if there are global module hooks, such as those of `register_module_forward_hook`."""
    return bool(
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )


def is_traced() -> bool:
    """Return True inside of a trace or a function transform (`torch.compile`, `jit.trace`, `torch.func`)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
