"""Mixed batches on a CPU without gradients: the output of a layer for rows that have one adapter each or none.

Compiled code reads the factors of each row's adapter from the adapter's own memory (`compiled_low_rank.RowTable`), so
no change of a value can be missed. Changed attributes and other memory are noticed by a comparison with the adapters'
state, which the first layer of a call of the model makes for all layers. With 16 adapters in 210 layers, the comparison
takes 8 ms of a step of 100, and less than 1 while weights are promised not to change, as in `generate`.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peftcore._util import adapter_changes
from peftcore._util.fingerprint import unchanging_scope
from peftcore.adapter import Adapter
from peftcore.compiled.low_rank import (
    Factors,
    RowTable,
    add_low_rank_by_row,
    computes,
    factors_of,
    fits_by_row,
    row_table,
)
from peftcore.composition.route import Route
from peftcore.layers.decoding import FEW_TOKENS, DecodingPlan, base_output, base_plan, own_factors
from peftcore.layers.shared_inputs import is_replica

if TYPE_CHECKING:
    from peftcore.layers.adapter_layer import AdapterLayer

_size = attrgetter("nbytes")
"""Size of a tensor's elements (bytes), which changes with their number and with their type."""


class AdapterState(NamedTuple):
    """An adapter of a layer as compiled code reads it, and what that depends on, as it was when it was looked up."""

    attributes: Mapping[str, Any]
    """The adapter's attributes now."""
    changes: int
    """`adapter.changes`"""
    dropout: Mapping[str, Any] | None
    """The attributes of its dropout now."""
    parameters: Mapping[str, Any]
    """Its parameters now."""
    names: tuple[str, ...]
    """The names of A and B."""
    places: tuple[tuple[int, ...], tuple[int, ...]]
    """Addresses of A and B, and their sizes in bytes."""
    scope: object | None
    """`unchanging_scope()`"""
    row: Factors | None
    """A, B and s for C; None if the adapter computes more than s·B A x."""

    def holds(self, scope: object | None) -> bool:
        """Return True if nothing has changed.

        Args:
            scope: `unchanging_scope()` now.
        """
        attributes, changes, dropout, parameters, names, places, own_scope, _ = self
        if attributes.get("changes", 0) != changes or (dropout is not None and dropout["training"]):
            return False
        if scope is not None and own_scope is scope:
            return True
        tensors = [parameters[name] for name in names]
        return (tuple(map(Tensor.data_ptr, tensors)), tuple(map(_size, tensors))) == places


def _state_of(adapter: Adapter) -> AdapterState:
    """Look the adapter's state up."""
    attributes: Any = vars(adapter)
    own = own_factors(adapter)
    if own is None:
        return AdapterState(attributes, adapter.changes, None, {}, (), ((), ()), unchanging_scope(), None)
    names = own.a, own.b
    a, b = (own.parameters[name] for name in names)
    is_product = own.diagonal is None and not own.has_gain
    dropout: Any = None if own.dropout is None else vars(own.dropout)
    places = (a.data_ptr(), b.data_ptr()), (a.nbytes, b.nbytes)
    row = factors_of(a, b, adapter.scaling) if is_product else None
    return AdapterState(attributes, own.changes, dropout, own.parameters, names, places, unchanging_scope(), row)


class AdapterStates:
    """The states of many adapters, in lists that are compared with the present in a few steps."""

    def __init__(self, states: Iterable[AdapterState]):
        states = list(states)
        self._latest_change: object | None = None
        """`adapter_changes.latest` when the counts of changes were last compared; None if they never were."""
        self._attributes = [state.attributes for state in states]
        self._changes = [state.changes for state in states]
        self._dropouts = [state.dropout for state in states if state.dropout is not None]
        self._parameters = [(state.parameters, name) for state in states for name in state.names]
        self._addresses = [address for state in states for address in state.places[0]]
        self._sizes = [size for state in states for size in state.places[1]]

    def hold(self, compare_memory: bool) -> bool:
        """Return True if nothing has changed.

        Args:
            compare_memory: False if the factors are known to be in the same memory as before.
        """
        latest_change = adapter_changes.latest
        if latest_change is not self._latest_change:
            if [attributes.get("changes", 0) for attributes in self._attributes] != self._changes:
                return False
            self._latest_change = latest_change
        if True in [attributes["training"] for attributes in self._dropouts]:
            return False
        if not compare_memory:
            return True
        tensors = [parameters[name] for parameters, name in self._parameters]
        return list(map(Tensor.data_ptr, tensors)) == self._addresses and list(map(_size, tensors)) == self._sizes


class RowPlan(NamedTuple):
    """The calculation of a layer for a batch whose rows have one adapter each, or none."""

    plan: DecodingPlan
    """The plan of the base layer."""
    adapters: list[AdapterState]
    table: RowTable | None
    """None if the layer's adapters cannot be computed by row."""


class RowPlans:
    """The plans of all layers for one list of compositions. Several threads may use it at a time."""

    def __init__(self, route: Route):
        chains = [one.chain() for one in route.compositions]
        is_plain = all(chain is not None and len(chain) < 2 for chain in chains)
        self.rows = [chain[0] if chain else None for chain in chains] if is_plain else None
        """The adapter of each row; None if a composition is not a single adapter or the base."""
        self._of: dict[AdapterLayer, RowPlan] = {}
        self._lock = threading.Lock()
        self._adapters: AdapterStates | None = None
        """The adapters of all plans; None if the plans have changed."""
        self._scope: object | None = None
        """The `unchanging_weights` context in which the memory of all factors was last compared."""

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
                self._adapters = AdapterStates(state for plan in self._of.values() for state in plan.adapters)
            if not self._adapters.hold(compare_memory=scope is None or scope is not self._scope):
                self._check(list(self._of))
            self._scope = scope

    def _check(self, layers: Sequence["AdapterLayer"]) -> None:
        for layer in layers:
            plan = self._of.get(layer)
            if plan is not None and not all(state.holds(None) for state in plan.adapters):
                del self._of[layer]
                self._adapters = None


def decoded_by_row(layer: "AdapterLayer", route: Route, x: Tensor) -> Tensor | None:
    """Return the output of a layer for a mixed batch on a CPU; None if this path does not apply.

    Args:
        layer: the adapter layer that is called, without gradients and outside of a trace.
        route: the compositions of the rows, each a single adapter or the base alone.
        x: its input (rows, ..., in_features).
    """
    if not (x.is_cpu and x.dim() > 1 and x.numel()) or not computes(x.dtype):
        return None
    if is_replica(layer) or torch._C._is_any_autocast_enabled():
        return None
    is_long = x.numel() > FEW_TOKENS * x.shape[-1]
    if is_long and layer.base.compute_dtype(x) is not x.dtype:  # the base is no product in x's type
        return None
    plans = _checked_plans(layer, route)
    found = plans.get(layer)
    if found is None or not found.plan.holds(layer, route.names):
        found = _new_row_plan(layer, route.names, plans.rows)
        if found is None:
            return None
        plans.add(layer, found)
    if found.table is None or not fits_by_row(
        x, found.table
    ):  # before the base's product, which takes most of the time
        return None
    layer.check_rows(x, route)
    y = layer.base.product(x) if is_long else base_output(layer, found.plan, x)
    return y if y is not None and add_low_rank_by_row(y, x, found.table) else None


def _checked_plans(layer: "AdapterLayer", route: Route) -> RowPlans:
    """Return the route's plans, of which those of the layer, or of all layers in this call, have been checked."""
    plans = route.plans.get(RowPlans)
    if plans is None:
        plans = route.plans[RowPlans] = RowPlans(route)
    cache = layer.selection.cache
    if not cache.running:
        plans.check(layer)
    elif cache.checked is not plans:
        plans.check_all()
        cache.checked = plans
    return plans


def _new_row_plan(layer: "AdapterLayer", names: tuple[str, ...], rows: Sequence[str | None] | None) -> RowPlan | None:
    """Return a plan for the layer as it is now; None if the layer's base computes more than that."""
    plan = base_plan(layer, names)
    if plan is None:
        return None
    states, table = _known_states(layer.selection.adapter_states, layer.unmerged_among(names)), None
    if rows is not None and all(state.row is not None for state in states.values()):
        table = row_table([states[name].row if name in states else None for name in rows])
    return RowPlan(plan, list(states.values()), table)


def _known_states(known: dict[Adapter, AdapterState], adapters: Mapping[str, Adapter]) -> dict[str, AdapterState]:
    """Return the states of a layer's adapters by name, from `known` if they hold: batches often differ in one row."""
    states, scope = {}, unchanging_scope()
    for name, adapter in adapters.items():
        state = known.get(adapter)
        if state is None or not state.holds(scope):
            state = known[adapter] = _state_of(adapter)
        states[name] = state
    return states
