"""Which adapters of a model act: for everybody, or in the thread that has opened a route."""

import contextlib
import copy
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore._util.forward_records import ForwardRecord, live_records, recomputed
from peftcore.composition.route import Route
from peftcore.layers.shared_inputs import ThisThread

KEPT = 4
"""Sets of acting adapters (count) of which layers remember how they compute."""
CONTEXTS = 64
"""Routes (count), closed ones included, whose layers can be computed again though nobody called the whole model."""


class _Opened(NamedTuple):
    """A route that a context has opened."""

    route: Route
    backward: int
    """The backward pass inside of which it was opened; -1: none."""


_ROUTES: ContextVar[Mapping[int, _Opened]] = ContextVar("peftcore_routes", default={})  # noqa: B039
"""{id of a selection: the route that this context has opened}; a new mapping for each."""


class Selection:
    """Which adapters act; one object shared by every wrapper of a model, so that switching is one assignment.

    `active` holds for the model. Over it stands the route of the thread that asks, where it has opened one. Layers that
    activation checkpointing computes again see what held in their own forward pass.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.switched_off = False
        """Whether `disable_adapters` was called last, not `enable_adapters`."""
        self.here = ThisThread()
        """The calls of the model that run in this thread, and what layers have computed for others in them."""
        self.stacks: dict[Any, Any] = {}
        """What `peftcore.composition.stacked` keeps for each layer."""
        self._plans: dict[Any, dict[Any, Any]] = {}
        self.in_use: Counter[str] = Counter()
        """How many routes, of all threads, an adapter is in."""
        self._open = self._running = 0
        """How many routes are open, and how many calls of the model run, in all threads."""
        self._lock = threading.Lock()
        self._records = False
        """Whether there has been a forward pass that may be computed again."""
        self._latest: ForwardRecord | None = None
        """Kept for a caller who keeps hidden states that hooks gave him, and not the outputs."""
        self._contexts: deque[ForwardRecord] = deque(maxlen=CONTEXTS)

    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active, "switched_off": self.switched_off}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.active, self.switched_off = state["active"], state["switched_off"]

    @contextlib.contextmanager
    def routed(self, route: Route) -> Iterator[Route]:
        """This thread's calls of the model go by `route` while inside."""
        route.plans = self.plans_of(route.compositions if route.chain is None else route.chain)
        with self._lock:
            self._open += 1
            self.in_use.update(route.names)
        opened = _Opened(route, torch._C._current_graph_task_id())
        token = _ROUTES.set({**_ROUTES.get(), id(self): opened})
        record = self._record(route, {}, is_call=bool(self.here.calls))
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

    def begin_call(self, values: Mapping[Any, Mapping[str, Any]]) -> None:
        """A call of the model begins in this thread, and its layers may share what they compute.

        values: what its adapter arguments came to; see `ForwardRecord`. Of a call that `torch.compile` has made, a part
        of which may run uncompiled, neither the beginning nor the end is told.
        """
        route = self.route
        record = self._record(self._active_now if route is None else copy.copy(route), values, is_call=True)
        self.here.calls.append(record)
        with self._lock:
            self._running += 1
        if record is not None:
            self._latest = record

    def end_call(self, outputs: Any) -> None:
        """The call that began last is over; outputs: None where it ended with an error."""
        if not self.here.calls:  # another hook has raised before the call began
            return
        record = self.here.calls.pop()
        with self._lock:
            self._running -= 1
        if record is not None:
            record.close(outputs)
        if not self.here.calls:
            self.here.forget(live_records(self) if self._records else ())

    def runs_elsewhere(self) -> bool:
        """Whether another thread is calling the model."""
        return self._running > len(self.here.calls)

    def _record(self, acting: Any, values: Mapping[Any, Any], is_call: bool) -> ForwardRecord | None:
        """A record that begins here; None without gradients, where nothing is computed again."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        self._records = True
        return ForwardRecord(self, acting, values, is_call)

    def plans_of(self, acting: tuple[Any, ...]) -> dict[Any, Any]:
        """{layer: what `peftcore.layers.fast_path` remembers} while these act: names in order, or compositions of rows."""
        found = self._plans.get(acting)
        if found is None:
            found = {}
            latest = list(self._plans.items())[1 - KEPT :]
            self._plans = {**dict(latest), acting: found}  # by one assignment, for other threads read it
        return found

    def forget(self) -> None:
        """Let go of what was kept of adapters and layers that may be others now."""
        self.stacks, self._plans = {}, {}
        self._latest = None
        self._contexts.clear()

    @property
    def recomputed(self) -> ForwardRecord | None:
        """The forward pass whose layers are computed again; None where none is."""
        return recomputed(self) if self._records else None

    @property
    def _active_now(self) -> tuple[str, ...]:
        return () if self.switched_off else self.active

    @property
    def now(self) -> Route | tuple[str, ...]:
        """The route that holds now, or the names of the adapters that act."""
        if not self._open and (not self._records or torch.compiler.is_compiling()):
            return () if self.switched_off else self.active
        opened = _ROUTES.get().get(id(self)) if self._open else None
        backward = torch._C._current_graph_task_id()
        if opened is not None and opened.backward == backward:  # also inside of a recomputation
            return opened.route
        record = None if backward == -1 else recomputed(self)
        return self._active_now if record is None else record.acting

    @property
    def route(self) -> Route | None:
        """The route that holds now; None where `active` does."""
        now = self.now
        return now if isinstance(now, Route) else None

    @property
    def acting(self) -> tuple[str, ...]:
        """Names in the order in which they act, of a route every one that has a part in it; () while disabled."""
        now = self.now
        if isinstance(now, Route):
            return now.names if now.chain is None else now.chain
        return now

    def share(self, name: str, rows: int) -> float | Tensor:
        """How much of what an adapter adds is added: 1 where it acts, 0 where not, or (B,) for each row."""
        route = self.route
        if route is None or route.chain is not None:
            return 1.0 if name in self.acting else 0.0
        return route.shares(name, rows) if name in route.names else 0.0


def in_compiled_call() -> bool:
    """Whether this is a part, compiled or not, of what `torch.compile` has made."""
    return torch.compiler.is_compiling() or _uncompiled_part()


def _uncompiled_part() -> bool:
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)  # type: ignore[attr-defined]
