"""Which adapters of a model act: for everybody, or in the thread that has opened a route."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from peftcore.composition.route import Route
from peftcore.neighbours import Waitings

KEPT = 4
"""Sets of acting adapters (count) of which layers remember how they compute."""
_ROUTES: ContextVar[Mapping[int, Route]] = ContextVar("peftcore_routes", default={})  # noqa: B039
"""{id of a selection: the route that this context has opened}; a new mapping for each."""


class Selection:
    """Which adapters act; one object shared by every host of a model, so that switching is one assignment.

    `active` holds for the model. Over it stands the route of the thread that asks, where it has opened one.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.switched_off = False
        """Whether `disable_adapters` was called last, not `enable_adapters`."""
        self.waiting: Waitings = Waitings()
        """What hosts have computed for others that read the same input, until those are called."""
        self.recomputed: Route | None = None
        """The route of the last forward, for layers that activation checkpointing computes again in the backward."""
        self.stacks: dict[Any, Any] = {}
        """What `peftcore.composition.stacked` keeps for each layer."""
        self._plans: dict[Any, dict[Any, Any]] = {}
        self.in_use: Counter[str] = Counter()
        """How many routes, of all threads, an adapter is in."""
        self._open = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active, "disabled": self.disabled, "switched_off": self.switched_off}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.__dict__ |= state

    @contextlib.contextmanager
    def routed(self, route: Route) -> Iterator[Route]:
        """This thread's calls of the model go by `route` while inside."""
        route.plans = self.plans_of(route.compositions if route.chain is None else route.chain)
        with self._lock:
            self._open += 1
            self.in_use.update(route.names)
        token = _ROUTES.set({**_ROUTES.get(), id(self): route})
        try:
            yield route
        finally:
            _ROUTES.reset(token)
            with self._lock:
                self._open -= 1
                self.in_use.subtract(route.names)

    def plans_of(self, acting: tuple[Any, ...]) -> dict[Any, Any]:
        """{layer: what `peftcore.fast_path` knows of it} while these act: names in order, or compositions of rows."""
        found = self._plans.get(acting)
        if found is None:
            found = {}
            latest = list(self._plans.items())[1 - KEPT :]
            self._plans = {**dict(latest), acting: found}  # by one assignment, for other threads read it
        return found

    def forget(self) -> None:
        """Let go of what was kept of adapters and layers that may be others now."""
        self.stacks, self._plans = {}, {}

    @property
    def route(self) -> Route | None:
        """The route that holds now; None where `active` does."""
        if not self._open and self.recomputed is None:
            return None
        if torch._C._current_graph_task_id() != -1:  # in a backward, which may run in a thread of its own
            return self.recomputed
        return _ROUTES.get().get(id(self)) if self._open else None

    @property
    def acting(self) -> tuple[str, ...]:
        """Names in the order in which they act, of a route every one that has a part in it; () while disabled."""
        route = self.route
        if route is not None:
            return route.names if route.chain is None else route.chain
        return () if self.disabled or self.switched_off else self.active

    def share(self, name: str, rows: int) -> float | Tensor:
        """How much of what an adapter adds is added: 1 where it acts, 0 where not, or (B,) for each row."""
        route = self.route
        if route is None or route.chain is not None:
            return 1.0 if name in self.acting else 0.0
        return route.shares(name, rows) if name in route.names else 0.0
