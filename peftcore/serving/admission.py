"""Admission of requests to the batch: a request waits, then its adapters are loaded, then it is ready for a row.

Worker threads load adapters while the engine decodes, so an adapter that loads slowly delays only its own requests.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from peftcore.serving.catalog import Catalog, ModelLease
from peftcore.serving.errors import AdapterFailedError, NoRoomError, QueueFullError, ServingError
from peftcore.serving.generation import Generation

LOAD_WAIT = 0.005
"""Seconds that the engine waits for an adapter; enough for an adapter that is already in the model."""

logger = logging.getLogger(__name__)


class Admission:
    """Queue of requests that have no row yet. Any thread may call `add`; the engine's thread calls the other methods.

    Args:
        catalog: The models that requests can name.
        rows: Most rows of the batch (count).
        max_queue: Most waiting requests (count).
        wake: Called when a request may have become ready.
    """

    def __init__(self, catalog: Catalog, rows: int, max_queue: int, wake: Callable[[], None]):
        self._catalog, self._max_queue, self._wake = catalog, max_queue, wake
        self._lock = threading.Lock()
        """Protects the waiting requests, the only state that several threads use."""
        self._waiting: deque[Generation] = deque()
        self._loading: dict[Generation, Future[ModelLease]] = {}
        self._loaded: deque[Generation] = deque()
        self._full = False
        """True if adapters in use fill the model, and none has been released since."""
        self._loaders = ThreadPoolExecutor(2 * rows, "adapter-load")

    def __len__(self) -> int:
        return len(self._waiting) + len(self._loading) + len(self._loaded)

    def add(self, generation: Generation) -> None:
        """Append a request to the queue. Raise QueueFullError if the queue is full."""
        with self._lock:
            if len(self._waiting) >= self._max_queue:
                raise QueueFullError(f"the queue is full: {len(self._waiting)} requests are waiting; try again later")
            self._waiting.append(generation)

    def released(self) -> None:
        """Note that adapters have been released, and wake the engine if requests wait for them."""
        if self._full:
            self._full = False
            self._wake()

    def ready(self, room: int, alone: bool, others: bool) -> list[Generation]:
        """Return requests whose adapters are loaded. They stay in the queue until `take`.

        Args:
            room: Most requests to return (count).
            alone: Wait until adapters are loaded, without a limit of time.
            others: True if the batch has rows, whose adapters will be released later.
        """
        self._drop_abandoned()
        loading = self._start_loading(room) if not self._full else []
        wait(loading, None if alone else LOAD_WAIT)
        for generation in [one for one, future in self._loading.items() if future.done()]:
            self._settle(generation, self._loading.pop(generation), others)
        if self._full and not others and not self._loading and not self._loaded:
            self.released()
        return list(self._loaded)[:room]

    def take(self, generations: list[Generation]) -> None:
        """Remove requests that have got a row."""
        for generation in generations:
            self._loaded.remove(generation)

    def fail(self, error: ServingError) -> None:
        """End every request in the queue with an error."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for generation in waiting:
            generation.fail(error)
        for generation in [*self._loading, *self._loaded]:
            generation.abandoned = True
            generation.fail(error)
        self._drop_abandoned()

    def close(self) -> None:
        """Stop the worker threads."""
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _drop_abandoned(self) -> None:
        with self._lock:
            self._waiting = deque(one for one in self._waiting if not one.abandoned)
        for generation in [one for one in self._loading if one.abandoned]:
            self._loading.pop(generation).add_done_callback(_release)
        for generation in [one for one in self._loaded if one.abandoned]:
            self._loaded.remove(generation)
            generation.release()

    def _start_loading(self, room: int) -> list[Future[ModelLease]]:
        loading: list[Future[ModelLease]] = []
        while self._waiting and len(self._loading) + len(self._loaded) < room:
            with self._lock:
                generation = self._waiting.popleft()
            future = self._loaders.submit(self._catalog.acquire, generation.model)
            self._loading[generation] = future
            loading.append(future)
        for future in loading:
            future.add_done_callback(lambda _: self._wake())
        return loading

    def _settle(self, generation: Generation, future: "Future[ModelLease]", others: bool) -> None:
        try:
            generation.lease = future.result()
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


def _release(future: "Future[ModelLease]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
