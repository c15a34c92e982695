"""Requests before they have a row: they wait, then their adapters are loaded, then they are ready.

Adapters are loaded by other threads while the engine goes on with its rows, so one that loads slowly holds up nobody.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from peftcore.serving.catalog import Catalog, Held
from peftcore.serving.errors import AdapterFailedError, NoRoomError, QueueFullError, ServingError
from peftcore.serving.generation import Generation

PATIENCE = 0.005
"""Seconds that the engine waits for an adapter; one that is in the model already needs no more."""

logger = logging.getLogger(__name__)


class Admission:
    """`add` may be called by any thread, the rest by the engine's. wake: called when there is something to look at."""

    def __init__(self, catalog: Catalog, rows: int, max_queue: int, wake: Callable[[], None]):
        self._catalog, self._max_queue, self._wake = catalog, max_queue, wake
        self._lock = threading.Lock()
        """Guards what waits, which alone is touched by several threads."""
        self._waiting: deque[Generation] = deque()
        self._loading: dict[Generation, Future[Held]] = {}
        self._loaded: deque[Generation] = deque()
        self._full = False
        """Whether adapters in use fill the model, and nothing has been released since."""
        self._loaders = ThreadPoolExecutor(2 * rows, "adapter-load")

    def __len__(self) -> int:
        return len(self._waiting) + len(self._loading) + len(self._loaded)

    def add(self, generation: Generation) -> None:
        """Let a request wait. Raises QueueFullError."""
        with self._lock:
            if len(self._waiting) >= self._max_queue:
                raise QueueFullError(f"{len(self._waiting)} requests wait already; try again in a little while")
            self._waiting.append(generation)

    def released(self) -> None:
        """Told when adapters have been given back."""
        if self._full:
            self._full = False
            self._wake()

    def ready(self, room: int, alone: bool, others: bool) -> list[Generation]:
        """Requests that can have a row now, at most `room` (count), each with its adapters; they stay until `take`.

        alone: wait for adapters however long they take. others: whether there are rows now, whose adapters will be
        released some time.
        """
        self._forget_gone()
        fresh = self._start_loading(room) if not self._full else []
        wait(fresh, None if alone else PATIENCE)
        for generation in [one for one, future in self._loading.items() if future.done()]:
            self._settle(generation, self._loading.pop(generation), others)
        if self._full and not others and not self._loading and not self._loaded:
            self.released()
        return list(self._loaded)[:room]

    def take(self, generations: list[Generation]) -> None:
        """They have rows now."""
        for generation in generations:
            self._loaded.remove(generation)

    def fail(self, error: ServingError) -> None:
        """End all of them with an error."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for generation in waiting:
            generation.fail(error)
        for generation in [*self._loading, *self._loaded]:
            generation.gone = True
            generation.fail(error)
        self._forget_gone()

    def close(self) -> None:
        """Let the loaders end."""
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _forget_gone(self) -> None:
        with self._lock:
            self._waiting = deque(one for one in self._waiting if not one.gone)
        for generation in [one for one in self._loading if one.gone]:
            self._loading.pop(generation).add_done_callback(_release)
        for generation in [one for one in self._loaded if one.gone]:
            self._loaded.remove(generation)
            generation.release()

    def _start_loading(self, room: int) -> list[Future[Held]]:
        fresh: list[Future[Held]] = []
        while self._waiting and len(self._loading) + len(self._loaded) < room:
            with self._lock:
                generation = self._waiting.popleft()
            future = self._loaders.submit(self._catalog.acquire, generation.model)
            self._loading[generation] = future
            fresh.append(future)
        for future in fresh:
            future.add_done_callback(lambda _: self._wake())
        return fresh

    def _settle(self, generation: Generation, future: "Future[Held]", others: bool) -> None:
        try:
            generation.held = future.result()
        except NoRoomError as error:
            if others or self._loading or self._loaded:
                self._full = True
                with self._lock:
                    self._waiting.appendleft(generation)
            else:
                generation.fail(error)
        except ServingError as error:
            if isinstance(error, AdapterFailedError):
                logger.error("%s", error)
            generation.fail(error)
        except Exception as error:
            logger.exception("%s could not be loaded", generation.model)
            generation.fail(AdapterFailedError(f"{generation.model!r} could not be loaded: {type(error).__name__}"))
        else:
            self._loaded.append(generation)


def _release(future: "Future[Held]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
