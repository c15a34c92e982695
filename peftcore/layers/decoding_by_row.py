"""Decoding of mixed batches on a CPU: the output of a layer for few tokens, whose rows have one adapter each or none.

Compiled code reads the factors of each row's adapter where they lie (`compiled_low_rank.RowTable`), so no change of a
value can be missed. Before that, the layer's plan is compared with the state of all adapters of the batch. In a call of
the model, the first layer does so for all layers. With 16 adapters in 210 layers, that takes 8 ms of a step of 100, and
2 while weights are promised not to change, as in `generate`.
"""

import threading
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peftcore._util.fingerprint import unchanging_scope
from peftcore.composition.route import Route
from peftcore.kernels.compiled_low_rank import RowTable, add_low_rank_by_row, compiled, row_table
from peftcore.layers.decoding import FEW_TOKENS, DecodingPlan, OwnFactors, base_output, new_plan
from peftcore.layers.shared_inputs import is_replica

if TYPE_CHECKING:
    from peftcore.layers.adapter_layer import AdapterLayer


class AdapterState:
    """What plans depend on in their adapters, as it is now: attributes, dropout, and where the factors lie."""

    def __init__(self, factors: Iterable[OwnFactors]):
        factors = list(factors)
        self._attributes = [vars(own.adapter) for own in factors]
        self._dropouts = [vars(own.dropout) for own in factors if own.dropout is not None]
        self._factors = [(own.parameters, name) for own in factors for name in (own.names.a, own.names.b)]
        self._changes = self._changes_now()
        self._addresses, self._sizes = self._places_now()

    @classmethod
    def joined(cls, states: Iterable["AdapterState"]) -> "AdapterState":
        """Return the states as one, which is compared in fewer steps."""
        states, new = list(states), cls(())
        for name in vars(new):
            setattr(new, name, list(chain.from_iterable(getattr(state, name) for state in states)))
        return new

    def holds(self, moved: bool) -> bool:
        """Return True if nothing has changed. moved: False if the factors are known to lie where they lay."""
        return (
            self._changes_now() == self._changes
            and True not in [attributes["training"] for attributes in self._dropouts]
            and (not moved or self._places_now() == (self._addresses, self._sizes))
        )

    def _changes_now(self) -> list[int | None]:
        return [attributes.get("changes") for attributes in self._attributes]

    def _places_now(self) -> tuple[list[int], list[int]]:
        tensors = [parameters[name] for parameters, name in self._factors]
        return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))


class RowPlan(NamedTuple):
    """The calculation of a layer for a batch whose rows have one adapter each, or none."""

    plan: DecodingPlan
    """The plan for all adapters of the batch, as if they were a chain."""
    adapters: AdapterState
    tokens: int
    """Tokens of the batch (count)."""
    table: RowTable | None
    """None if the layer's adapters cannot be computed by row."""


class RowPlans:
    """The plans of all layers for one list of compositions. Several threads may use it at a time."""

    def __init__(self) -> None:
        self._of: dict[AdapterLayer, RowPlan] = {}
        self._lock = threading.Lock()
        self._adapters: AdapterState | None = None
        """The adapters of all plans; None if the plans have changed."""
        self._scope: object | None = None
        """The `unchanging_weights` context in which all factors were last found where they lay."""

    def get(self, layer: "AdapterLayer") -> RowPlan | None:
        """Return the layer's plan, if it has one."""
        return self._of.get(layer)

    def add(self, layer: "AdapterLayer", plan: RowPlan) -> None:
        """Remember a layer's plan."""
        with self._lock:
            self._of[layer], self._adapters = plan, None

    def check(self, layer: "AdapterLayer") -> None:
        """Drop the layer's plan if its adapters have changed."""
        with self._lock:
            self._check([layer])

    def check_all(self) -> None:
        """Drop the plans whose adapters have changed."""
        scope = unchanging_scope()
        with self._lock:
            if self._adapters is None:
                self._adapters = AdapterState.joined(plan.adapters for plan in self._of.values())
            if not self._adapters.holds(moved=scope is None or scope is not self._scope):
                self._check(list(self._of))
            self._scope = scope

    def _check(self, layers: Sequence["AdapterLayer"]) -> None:
        for layer in layers:
            plan = self._of.get(layer)
            if plan is not None and not plan.adapters.holds(moved=True):
                del self._of[layer]
                self._adapters = None


def decoded_by_row(layer: "AdapterLayer", route: Route, x: Tensor) -> Tensor | None:
    """Return the output of a layer for a mixed batch of few tokens on a CPU; None if this path does not apply.

    Args:
        layer: the adapter layer that is called, without gradients and outside of a trace.
        route: the compositions of the rows, each a single adapter or the base alone.
        x: its input (..., in_features).
    """
    if not (x.is_cpu and x.dim() and 0 < x.numel() <= FEW_TOKENS * x.shape[-1]) or x.dtype not in compiled():
        return None
    if is_replica(layer) or torch._C._is_any_autocast_enabled():
        return None
    tokens, plans = x.numel() // x.shape[-1], _checked_plans(layer, route)
    found = plans.get(layer)
    if found is None or found.tokens != tokens or not found.plan.holds(layer, route.names):
        found = _new_row_plan(layer, route, tokens)
        if found is None:
            return None
        plans.add(layer, found)
    if found.table is None:
        return None
    layer.check_rows(x, route)
    y = base_output(layer, found.plan, x)
    return y if y is not None and add_low_rank_by_row(y, x, found.table) else None


def _checked_plans(layer: "AdapterLayer", route: Route) -> RowPlans:
    """Return the route's plans, of which those of the layer, or of all layers in this call, have been checked."""
    plans = route.plans.get(RowPlans)
    if plans is None:
        plans = route.plans[RowPlans] = RowPlans()
    cache = layer.selection.cache
    if not cache.running:
        plans.check(layer)
    elif cache.checked is not plans:
        plans.check_all()
        cache.checked = plans
    return plans


def _new_row_plan(layer: "AdapterLayer", route: Route, tokens: int) -> RowPlan | None:
    """Return a plan for the layer as it is now; None if the layer's base computes more than that."""
    plan = new_plan(layer, route.names)
    if plan is None:
        return None
    factors = plan.factors or []
    chains, table = [one.chain() for one in route.compositions], None
    is_plain = factors and all(own.names.diagonal is None and not own.names.has_gain for own in factors)
    if is_plain and tokens % len(chains) == 0 and all(chain is not None and len(chain) < 2 for chain in chains):
        numbers = {name: number for number, name in enumerate(layer.unmerged_among(route.names))}
        rows = [numbers.get(chain[0]) if chain else None for chain in chains]
        each = tokens // len(chains)
        table = row_table(
            _tensors(factors), [own.adapter.scaling for own in factors], [row for row in rows for _ in range(each)]
        )
    return RowPlan(plan, AdapterState(factors), tokens, table)


def _tensors(factors: Sequence[OwnFactors]) -> list[Any]:
    """Return A and B of each adapter."""
    return [own.parameters[name] for own in factors for name in (own.names.a, own.names.b)]
