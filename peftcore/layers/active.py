"""Selection of the adapters in effect: the active adapters, or in one thread the adapters of its open route."""

import contextlib
import copy
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore._util.forward_records import ForwardRecord, live_records, recomputed
from peftcore.composition.route import Route
from peftcore.layers.shared_inputs import RunningCall, SharedInputCache

REMEMBERED_SETS = 4
"""Sets of adapters in effect (count) for which layers remember their plans."""
REMEMBERED_CONTEXTS = 64
"""Routes (count), closed ones included, whose layers can be recomputed although the whole model was not called."""


class _OpenRoute(NamedTuple):
    """A route that a context has opened."""

    route: Route
    backward: int
    """The backward pass inside of which the route was opened; -1 for none."""


_ROUTES: ContextVar[Mapping[int, _OpenRoute]] = ContextVar("peftcore_routes", default={})  # noqa: B039
"""{id of a selection: the route that is open in this context}; each change makes a new mapping."""


class Selection:
    """The adapters in effect. All wrappers of a model share one selection, so switching is one assignment.

    `active` holds the names that `set_adapter` has set, for the whole model. `in_effect` holds the names for this
    thread, by the first rule that applies: with an open route, the route's adapters, even after `disable_adapters`;
    while adapters are disabled, (); else `active`. Layers that activation checkpointing recomputes use the adapters
    that were in effect in their own forward pass.
    """

    def __init__(self) -> None:
        self._active: tuple[str, ...] = ()
        self.switched_off = False
        """True after `disable_adapters`, until `enable_adapters`."""
        self.apart: list[Any] = []
        """Wrappers whose active adapters differ from the model's; each has its own `LayerSelection`."""
        self.cache = SharedInputCache()
        """The calls of the model that run in this thread, and the outputs that layers have cached in them."""
        self.stacks: dict[Any, Any] = {}
        """The cache of `peftcore.composition.stacked`, by layer."""
        self.adapter_states: dict[Any, Any] = {}
        """{adapter: its state}, the cache of `peftcore.layers.decoding_by_row`."""
        self._plans: dict[Any, dict[Any, Any]] = {}
        self.in_use: Counter[str] = Counter()
        """{adapter: open routes, of all threads, that it is in (count)}"""
        self._open = self._running = 0
        """Open routes, and running calls of the model, in all threads (counts)."""
        self._lock = threading.RLock()
        self._records = False
        """True once a forward pass has run that may be recomputed."""
        self._latest: ForwardRecord | None = None
        """Keeps the last record alive if the caller keeps only hidden states from hooks, and not the outputs."""
        self._contexts: deque[ForwardRecord] = deque(maxlen=REMEMBERED_CONTEXTS)
        self.owner: Any = None
        """The model's `AdapterSet`, by which one wrapper switches or merges adapters."""

    def __getstate__(self) -> dict[str, Any]:
        names = ("_active", "switched_off", "owner", "apart")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        vars(self).update(state)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the model's active adapters. An assignment also changes wrappers that were switched separately."""
        return self._active

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        self._active = names
        if self.apart:
            for wrapper in self.apart:
                wrapper.selection.active = names
            self.owner.join_wrappers()

    @property
    def in_effect_anywhere(self) -> tuple[str, ...]:
        """Names of the adapters in effect, followed by those in effect in single wrappers only."""
        own = (name for wrapper in self.apart for name in wrapper.selection.in_effect)
        return tuple(dict.fromkeys((*self.in_effect, *own))) if self.apart else self.in_effect

    @contextlib.contextmanager
    def routed(self, route: Route) -> Iterator[Route]:
        """Put a route into effect, for the calls of the model in this thread.

        Args:
            route: the compositions of the rows.

        Yields:
            The route.
        """
        route.plans = self.plans_of(route.compositions if route.chain is None else route.chain)
        with self._lock:
            self._open += 1
            self.in_use.update(route.names)
        opened = _OpenRoute(route, torch._C._current_graph_task_id())
        token = _ROUTES.set({**_ROUTES.get(), id(self): opened})
        record = self._record(route, {}, is_call=bool(self.cache.calls))
        if record is not None:
            self._contexts.append(record)
        try:
            yield route
        finally:
            if record is not None:
                record.close()
            _ROUTES.reset(token)
            with self._lock:
                self._open -= 1
                self.in_use.subtract(route.names)
                for name in set(route.names):
                    if not self.in_use[name]:
                        del self.in_use[name]  # else it would keep every name that was ever routed

    def begin_call(self, values: Mapping[Any, Mapping[str, Any]], frame: FrameType) -> None:
        """Record the start of a model call in this thread. Sibling layers may share outputs until the call ends.

        Neither this method nor `end_call` is called for a call that `torch.compile` has made, part of which may run
        uncompiled.

        Args:
            values: the values of the adapter arguments of this call; see `ForwardRecord`.
            frame: PyTorch's frame that runs the forward pass.
        """
        route = self.route
        record = self._record(self._active_now if route is None else copy.copy(route), values, is_call=True)
        self.cache.calls.append(RunningCall(self, record, frame))
        with self._lock:
            self._running += 1
        if record is not None:
            self._latest = record

    def end_call(self, outputs: Any) -> None:
        """Record the end of the innermost model call, and clear the shared outputs after the outermost one.

        Args:
            outputs: the model's outputs, whose autograd graph keeps the call's record; None if the call raised an
                error.
        """
        running = self.cache.running
        if not running:  # another hook raised before the call began
            return
        record = running.pop().record
        with self._lock:
            self._running -= 1
        if record is not None:
            record.close(outputs)
        if not running:
            self.cache.clear(live_records(self) if self._records else ())

    def runs_elsewhere(self) -> bool:
        """Return True if another thread is calling the model."""
        return self._running > len(self.cache.calls)

    @property
    def has_open_routes(self) -> bool:
        """True while any thread is inside of a route or of `disable_adapter`."""
        return self._open > 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other thread open or close a route, begin or end a call, merge or unmerge inside of the context."""
        with self._lock:
            yield

    def _record(self, in_effect: Any, values: Mapping[Any, Any], is_call: bool) -> ForwardRecord | None:
        """Begin a record; None without gradients, because nothing is recomputed then."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        self._records = True
        return ForwardRecord(self, in_effect, values, is_call)

    def plans_of(self, in_effect: tuple[Any, ...]) -> dict[Any, Any]:
        """Return {layer: its remembered plan} for a set of adapters in effect.

        Args:
            in_effect: names in order, or the compositions of the rows.
        """
        plans = self._plans.get(in_effect)
        if plans is None:
            plans = {}
            latest = list(self._plans.items())[1 - REMEMBERED_SETS :]
            self._plans = {**dict(latest), in_effect: plans}  # one assignment, because other threads read it
        return plans

    def forget(self) -> None:
        """Drop everything that was computed from weights, adapters and layers, which may have changed."""
        self.stacks, self.adapter_states, self._plans = {}, {}, {}
        self._latest = None
        self._contexts.clear()

    @property
    def recomputed(self) -> ForwardRecord | None:
        """The forward pass that is being recomputed; None outside of a recomputation."""
        return recomputed(self) if self._records else None

    @property
    def _active_now(self) -> tuple[str, ...]:
        return () if self.switched_off else self._active

    @property
    def now(self) -> Route | tuple[str, ...]:
        """The route in effect; without a route, the names of the adapters in effect."""
        if not self._open and (not self._records or torch.compiler.is_compiling()):
            return () if self.switched_off else self._active
        opened = _ROUTES.get().get(id(self)) if self._open else None
        backward = torch._C._current_graph_task_id()
        if opened is not None and opened.backward == backward:  # also inside of a recomputation
            return opened.route
        record = None if backward == -1 else recomputed(self)
        return self._active_now if record is None else record.in_effect

    @property
    def route(self) -> Route | None:
        """The route in effect; None without one."""
        now = self.now
        return now if isinstance(now, Route) else None

    @property
    def disabled(self) -> bool:
        """True while the adapters are disabled, for the whole model or by the context in this thread."""
        route = self.route
        return self.switched_off if route is None else route.is_final

    @property
    def in_effect(self) -> tuple[str, ...]:
        """Names of the adapters in effect, in order; with a mixed route, every adapter that is in it."""
        now = self.now
        if isinstance(now, Route):
            return now.names if now.chain is None else now.chain
        return now

    def share(self, name: str, rows: int) -> float | Tensor:
        """Return the weight of an adapter whose effect is added: 1 if in effect, 0 if not, or (B,) per row.

        Args:
            name: the adapter.
            rows: B, rows of the batch (count).
        """
        route = self.route
        if route is None or route.chain is not None:
            return 1.0 if name in self.in_effect else 0.0
        return route.shares(name, rows) if name in route.names else 0.0


def in_compiled_call() -> bool:
    """Return True inside of a call that `torch.compile` has made, in its compiled and uncompiled parts."""
    return torch.compiler.is_compiling() or _uncompiled_part()


def _uncompiled_part() -> bool:
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)  # type: ignore[attr-defined]
