"""Decoding: the output of a layer for few tokens, without gradients.

`decoded` is for a batch whose rows have the same chain of adapters; `peftcore.layers.decoding_by_row` is for others.
It also takes longer inputs of adapters with two factors, where compiled code has the products.

With one token in each row, calling a layer costs more than its arithmetic: since the last token, its code and its data
have left the processor's caches. So this path makes as few calls as it can. What seldom changes is looked up once and
kept in a `DecodingPlan`, which every call compares with the state of the layer. The factors are read from the adapter
in every call, so no change of a weight can be missed.

The numbers are those of the general path: the base layer, then each adapter. They may be rounded in another way: the
base's product in float32 (`peftcore.bases.onednn`), and the adapters' products (`peftcore.compiled.low_rank` and
`low_rank_of_prompts`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from peftcore._util import adapter_changes
from peftcore.adapter import Adapter
from peftcore.bases.onednn import linear
from peftcore.bases.plain import LinearWeight
from peftcore.compiled.low_rank import Factors, add_low_rank, factors_of, fits_work
from peftcore.compiled.low_rank_of_prompts import add_low_rank_to_prompts, fits_prompts
from peftcore.composition.route import Route
from peftcore.kernels.maths import scaled
from peftcore.layers.composed import ascend, descend
from peftcore.layers.shared_inputs import widened_input

if TYPE_CHECKING:
    from peftcore.layers.adapter_layer import AdapterLayer

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_is_transforming = torch._C._are_functorch_transforms_active
_is_autocast_enabled = torch._C._is_any_autocast_enabled

FEW_TOKENS = 32
"""Largest number of tokens for which x, not the factors, is cast (count); measured by `benchmarks.decoding`."""
MOST_TOKENS = {torch.float32: 256, torch.bfloat16: 2**62}
"""{dtype: largest number of tokens for which compiled code computes the adapters (count)}."""


@dataclass(slots=True, eq=False)
class OwnFactors:
    """An adapter whose low-rank branch consists of its parameters, as `Adapter.factor_names` says."""

    adapter: Adapter
    changes: int
    """`adapter.changes` when the plan was made."""
    dropout: nn.Module | None
    """Not active when the plan was made; None if the adapter has none."""
    parameters: Mapping[str, Any]
    a: str
    """This and the next three are those of `FactorNames`."""
    b: str
    diagonal: str | None
    has_gain: bool
    factors: Factors | None = None
    """A, B and s for C, as they were in the last call; None if C cannot read them."""


class OwnScale(NamedTuple):
    """An adapter that only scales the output or the input of its layer, as `Adapter.scale_name` says."""

    adapter: Adapter
    changes: int
    """`adapter.changes` when the plan was made."""
    parameters: Mapping[str, Any]
    name: str
    of_input: bool


@dataclass(slots=True, eq=False)
class DecodingPlan:
    """The calculation of a layer for one chain of adapters, and the state of the layer for which it is right."""

    names: tuple[str, ...]
    """Adapters in effect, in order."""
    holder: Any
    """The layer's `NamedModules`; another one in a DataParallel replica."""
    changes: int
    """`holder.changes` when the plan was made."""
    latest_change: object
    """`adapter_changes.latest` when the plan was made, or when it was compared with the adapters."""
    merged: tuple[str, ...]
    base_layer: nn.Module
    attributes: Mapping[str, Any]
    """The attributes of the base layer."""
    hooks: tuple[Mapping[int, Any], ...]
    """The base layer's dictionaries of hooks, all of them empty."""
    parameters: Mapping[str, Any] | None
    """The parameters of a base layer whose forward is F.linear; else None."""
    adapters: list[Adapter]
    """The adapters that act: those of `names` that the layer has and that are not merged."""
    factors: list[OwnFactors] | None
    """The same as factors; None if that does not describe all of them."""
    scale: OwnScale | None
    """The adapter that acts, if there is only one and it is a scale; else None."""
    dropouts: list[nn.Module]
    """The dropouts of `factors`, none of which was active when the plan was made."""

    def holds(self, layer: "AdapterLayer", names: tuple[str, ...]) -> bool:
        """Return True if neither the adapters in effect nor the layer have changed since the plan was made."""
        modules: Any = layer._modules
        before, after, back, before_back = self.hooks
        return (
            (self.names is names or self.names == names)
            and layer.adapters is self.holder
            and layer.merged_names is self.merged
            and modules["base_layer"] is self.base_layer
            and not (before or after or back or before_back or layer.has_trained_biases)
            and "forward" not in self.attributes
            and (self.latest_change is adapter_changes.latest or self._holds_after_changes())
            and (not self.dropouts or not any(dropout.training for dropout in self.dropouts))
        )

    def _holds_after_changes(self) -> bool:
        """Return True if no adapter of this layer is among those that have changed."""
        latest = adapter_changes.latest
        if self.holder.changes != self.changes:
            return False
        if any(own.adapter.changes != own.changes for own in self.factors or ()):
            return False
        if self.scale is not None and self.scale.adapter.changes != self.scale.changes:
            return False
        self.latest_change = latest
        return True


def decoded(layer: "AdapterLayer", x: Tensor) -> Tensor | None:
    """Return the output of a layer with the adapters in effect; None if this path does not apply.

    Args:
        layer: the adapter layer that is called, in evaluation mode and without gradients.
        x: its input (..., in_features).

    Returns:
        The output (..., out_features). None for a long input that compiled code does not take, for rows with different
        adapters, for a base layer that has hooks or computes more than a product, for adapters that need its weight,
        inside of a trace, and while there are global module hooks.
    """
    if (
        _is_compiling()
        or _is_tracing()
        or _is_transforming()
        or forward_ad._current_level >= 0
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
        or not (shape := x.shape)
        or not (size := x.numel())
        or (size > FEW_TOKENS * shape[-1] and size > MOST_TOKENS.get(x.dtype, 0) * shape[-1])
    ):
        return None
    names: Any = layer.selection.now
    if type(names) is Route and (names := names.chain) is None:
        return None
    plan = layer.decoding_plan
    if plan is None or not plan.holds(layer, names):
        plan = layer.__dict__["decoding_plan"] = _new_plan(layer, names)
        if plan is None:
            return None
    if size > FEW_TOKENS * shape[-1]:
        return None if plan.factors is None else _of_many_tokens(layer, plan, plan.factors, x)
    if plan.factors is None:
        return _computed(layer, plan, x) if plan.scale is None else _scaled(layer, plan, plan.scale, x)
    y = base_output(layer, plan, x)
    if y is None:
        return None
    for own in plan.factors:
        parameters, middle, gain = own.parameters, None, None
        a, b, factors = parameters[own.a], parameters[own.b], own.factors
        if own.diagonal is not None:
            middle = parameters[own.diagonal]
        elif own.has_gain:
            gain = own.adapter.output_gain()
            if gain is None:
                return _computed(layer, plan, x)
        if factors is None or not add_low_rank(y, x, a, b, factors, middle, gain):
            own.factors = factors_of(a, b, own.adapter.scaling)
            y = _with_branch(y, x, a, b, middle, gain, own.adapter.scaling, layer, own.factors)
    return y


def _of_many_tokens(layer: "AdapterLayer", plan: DecodingPlan, adapters: list[OwnFactors], x: Tensor) -> Tensor | None:
    """Return the output for more than `FEW_TOKENS` tokens; None unless compiled code computes all adapters."""
    branches = []
    for own in adapters:
        parameters, scaling = own.parameters, own.adapter.scaling
        a, b = parameters[own.a], parameters[own.b]
        diagonal = None if own.diagonal is None else parameters[own.diagonal]
        gain = own.adapter.output_gain() if own.has_gain else None
        if own.has_gain and gain is None:
            return None
        if x.dtype is torch.float32:
            factors = factors_of(a, b, scaling)
            fits = factors is not None and fits_work(x, factors)
        else:
            factors, fits = None, fits_prompts(x, a, b)
        if not fits:
            return None
        branches.append((factors, a, b, scaling, diagonal, gain))
    y = base_output(layer, plan, x)
    if y is None:
        return None
    for factors, a, b, scaling, diagonal, gain in branches:
        if factors is None:
            added = add_low_rank_to_prompts(y, x, a, b, scaling, diagonal, gain)
        else:
            added = add_low_rank(y, x, a, b, factors, diagonal, gain)
        if not added:
            return None
    return y


def _new_plan(layer: "AdapterLayer", names: tuple[str, ...]) -> DecodingPlan | None:
    """Return a plan for the layer as it is now; None if its base layer has hooks, or a bias that trains."""
    plan = base_plan(layer, names)
    if plan is None:
        return None
    adapters = layer.in_order(names)
    factors = [own for own in map(own_factors, adapters) if own is not None]
    plan.adapters = adapters
    plan.factors = factors if len(factors) == len(adapters) else None
    plan.scale = _own_scale(adapters[0]) if len(adapters) == 1 else None
    plan.dropouts = [own.dropout for own in plan.factors or () if own.dropout is not None]
    return plan


def base_plan(layer: "AdapterLayer", names: tuple[str, ...]) -> DecodingPlan | None:
    """Return the plan without adapters; None if the base layer has hooks, or a bias that trains."""
    latest = adapter_changes.latest  # before anything is looked up: another thread may change it
    view = layer.base  # also moves the adapters to the base layer that is in place now
    base: Any = view.layer
    hooks = (base._forward_pre_hooks, base._forward_hooks, base._backward_hooks, base._backward_pre_hooks)
    if any(hooks) or "forward" in base.__dict__ or layer.has_trained_biases:
        return None
    holder = layer.adapters
    return DecodingPlan(
        names,
        holder,
        holder.changes,
        latest,
        layer.merged_names,
        base,
        vars(base),
        hooks,
        parameters=base._parameters if type(view) is LinearWeight and type(base) is nn.Linear else None,
        adapters=[],
        factors=[],
        scale=None,
        dropouts=[],
    )


def own_factors(adapter: Adapter) -> OwnFactors | None:
    """Return the adapter's factors if they are its parameters, and nothing is dropped now; else None."""
    names = adapter.factor_names()
    if names is None or adapter.dropout_probability:
        return None
    dropout = adapter._modules.get("dropout")
    return OwnFactors(adapter, adapter.changes, dropout, adapter._parameters, *names)


def _own_scale(adapter: Adapter) -> OwnScale | None:
    names = adapter.scale_name()
    return None if names is None else OwnScale(adapter, adapter.changes, adapter._parameters, *names)


def base_output(layer: "AdapterLayer", plan: DecodingPlan, x: Tensor) -> Tensor | None:
    """Return the base layer's output in new memory; None if its forward must compute it."""
    parameters = plan.parameters
    if parameters is None or _is_autocast_enabled():
        return layer.base.plain_output(x)
    weight = parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dtype is not x.dtype or weight.is_meta:
        return layer.base.plain_output(x)
    product = linear if weight.dtype is torch.float32 else F.linear
    return product(x, weight, parameters.get("bias"))


def _with_branch(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    diagonal: Tensor | None,
    gain: Tensor | None,
    scaling: Any,
    layer: "AdapterLayer",
    factors: Factors | None,
) -> Tensor:
    """Return g∘(y + s·BΛ(A x)), and change y.

    The few tokens of x are cast to the factors' type, not the reverse.
    """
    if factors is not None and add_low_rank(y, x, a, b, factors, diagonal, gain):
        return y
    dtype = a.dtype
    if not (dtype is b.dtype is x.dtype):  # even a cast that does nothing costs as much as a small product
        dtype = torch.promote_types(x.dtype, dtype)
        x = x if x.dtype is dtype else widened_input(layer, x, dtype)
        a, b = (a if a.dtype is dtype else a.to(dtype)), (b if b.dtype is dtype else b.to(dtype))
    h = F.linear(x, a)
    if diagonal is not None:
        h.mul_(diagonal.squeeze(1))
    y.add_(F.linear(h, b), alpha=scaling)
    return y if gain is None else scaled(y, gain)


def _scaled(layer: "AdapterLayer", plan: DecodingPlan, own: OwnScale, x: Tensor) -> Tensor | None:
    """Return the output of a layer whose only adapter scales the input or the output."""
    scale = own.parameters[own.name].view(-1)
    if own.of_input:
        return base_output(layer, plan, scaled(x, scale))
    y = base_output(layer, plan, x)
    return None if y is None else scaled(y, scale)


def _computed(layer: "AdapterLayer", plan: DecodingPlan, x: Tensor) -> Tensor | None:
    """Return the output with factors that each adapter computes now, or by `before` and `after` of each adapter."""
    branches = []
    for adapter in plan.adapters:
        branch = adapter.low_rank()
        if branch is None or branch.dropout:
            return _general(layer, plan, x)
        branches.append(branch)
    y = base_output(layer, plan, x)
    if y is not None:
        for a, b, scaling, _, gain in branches:
            y = _with_branch(y, x, a, b, None, gain, scaling, layer, factors_of(a, b, scaling))
    return y


def _general(layer: "AdapterLayer", plan: DecodingPlan, x: Tensor) -> Tensor | None:
    for adapter in plan.adapters:
        if adapter.weight_space_forward:
            return None
    inputs, z = descend(plan.adapters, x)
    y = base_output(layer, plan, z)
    return None if y is None else ascend(plan.adapters, inputs, y)
