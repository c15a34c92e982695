"""Admission of requests to the batch: a request waits, then its adapters are loaded, then it is ready for a row.

Worker threads load adapters while the engine decodes, so an adapter that loads slowly delays only its own requests.

Models share the server evenly: the next row goes to the model with the fewest requests in progress, and when the queue
is full, the model with the most waiting requests gives up its newest one. So a flood of requests for one model does not
keep out the others.
"""

import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, wait

from peftcore.serving.catalog import Catalog, ModelLease
from peftcore.serving.errors import AdapterFailedError, NoRoomError, QueueFullError, ServingError
from peftcore.serving.generation import Generation
from peftcore.serving.own_thread import in_own_thread

LOAD_WAIT = 0.005
"""Seconds that the engine waits for an adapter; enough for an adapter that is already in the model."""
LEAVING = 64
"""Requests (count) from whose leaving times the time until the queue moves is estimated."""
MAX_RETRY = 60
"""Longest time after which a refused client is told to try again (seconds)."""

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
        """Protects `_waiting` and `_requests`, the only state that several threads use."""
        self._waiting: dict[str, deque[Generation]] = {}
        """{model: its waiting requests in the order of arrival}; no model without requests"""
        self._requests: set[Generation] = set()
        """All requests from `add` until they have a row or end, also while they move between the other attributes."""
        self._left: deque[float] = deque(maxlen=LEAVING)
        """Times at which the last requests left the queue."""
        self._loading: dict[Generation, Future[ModelLease]] = {}
        self._loaded: deque[Generation] = deque()
        self._full = False
        """True if adapters in use fill the model, and none has been released since."""
        self._one_at_a_time = False
        """True after two requests may have taken each other's room; then nothing else loads beside the next one."""
        self._loaders = threading.BoundedSemaphore(2 * rows)
        """Limits the threads that load at the same time."""
        self._closed = False

    def __len__(self) -> int:
        """Return the number of requests; any thread may ask."""
        return len(self._requests)

    def _waiting_count(self) -> int:
        return sum(map(len, list(self._waiting.values())))

    def add(self, generation: Generation) -> None:
        """Append a request to the queue.

        If the queue is full, the newest request of the model with the most waiting requests fails in its place.

        Raises:
            QueueFullError: The queue is full, and no model has more waiting requests than this one would have.
        """
        refused: Generation | None = None
        error: QueueFullError | None = None
        with self._lock:
            if self._waiting_count() >= self._max_queue:
                waiting, seconds = self._waiting_count(), self._seconds_until_moved()
                error = QueueFullError(
                    f"the queue is full: {waiting} requests are waiting; try again in {seconds} s", retry_after=seconds
                )
                most = max(self._waiting, key=lambda model: len(self._waiting[model]))
                if len(self._waiting[most]) <= len(self._waiting.get(generation.model, ())) + 1:
                    raise error
                refused = self._waiting[most].pop()
                self._requests.discard(refused)
            self._requests.add(generation)
            self._waiting.setdefault(generation.model, deque()).append(generation)
        if refused is not None and error is not None:
            refused.fail(error)

    def _seconds_until_moved(self) -> int:
        """Estimate how long the waiting requests take to leave the queue, from how fast the last ones left."""
        if not self._left:
            return 1
        rate = len(self._left) / max(time.monotonic() - self._left[0], 1e-3)
        return max(1, min(MAX_RETRY, math.ceil(self._waiting_count() / rate)))

    def released(self) -> None:
        """Note that adapters have been released, and wake the engine if requests wait for them."""
        if self._full:
            self._full = False
            self._wake()

    def ready(self, room: int, alone: bool, running: Sequence[Generation]) -> list[Generation]:
        """Return requests whose adapters are loaded. They stay in the queue until `take`.

        Args:
            room: Most requests to return (count).
            alone: Wait until adapters are loaded, without a limit of time.
            running: Requests that have rows, whose adapters will be released later.
        """
        others = bool(running)
        self._drop_abandoned()
        loading = self._start_loading(room, running) if not self._full else []
        wait(loading, None if alone else LOAD_WAIT)
        for generation in [one for one, future in self._loading.items() if future.done()]:
            self._settle(generation, self._loading.pop(generation), others)
            if generation.finished:  # it failed
                self._forget([generation])
        if self._full and not others and not self._loading and not self._loaded:
            self.released()
        return list(self._loaded)[:room]

    def take(self, generations: list[Generation]) -> None:
        """Remove requests that have got a row."""
        for generation in generations:
            self._loaded.remove(generation)
        self._forget(generations)

    def take_loaded(self) -> list[Generation]:
        """Remove and return all requests that are ready for a row."""
        loaded = list(self._loaded)
        self.take(loaded)
        return loaded

    def _forget(self, generations: Iterable[Generation]) -> None:
        with self._lock:
            self._requests.difference_update(generations)

    def fail(self, error: ServingError) -> None:
        """End every request in the queue with an error."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for generation in itertools.chain(*waiting.values()):
            generation.fail(error)
        for generation in [*self._loading, *self._loaded]:
            generation.abandoned = True
            generation.fail(error)
        self._drop_abandoned()

    def close(self) -> None:
        """Load nothing more; loads that have begun run on."""
        self._closed = True

    def _drop_abandoned(self) -> None:
        with self._lock:
            self._requests = {one for one in self._requests if not one.abandoned and not one.finished}
            present = ((model, deque(one for one in own if not one.abandoned)) for model, own in self._waiting.items())
            self._waiting = {model: own for model, own in present if own}
        for generation in [one for one in self._loading if one.abandoned]:
            self._loading.pop(generation).add_done_callback(_release)
        for generation in [one for one in self._loaded if one.abandoned]:
            self._loaded.remove(generation)
            generation.release()

    def _start_loading(self, room: int, running: Sequence[Generation]) -> list[Future[ModelLease]]:
        loading: list[Future[ModelLease]] = []
        room = min(room, 1) if self._one_at_a_time else room
        while len(self._loading) + len(self._loaded) < room:
            if (generation := self._next(running)) is None:
                break
            future = in_own_thread(self._load, generation.model)
            self._loading[generation] = future
            loading.append(future)
        for future in loading:
            future.add_done_callback(lambda _: self._wake())
        return loading

    def _load(self, model: str) -> ModelLease:
        with self._loaders:
            if self._closed:
                raise CancelledError
            return self._catalog.acquire(model)

    def _next(self, running: Sequence[Generation]) -> Generation | None:
        """Remove and return the first waiting request of the model with the fewest requests in progress."""
        in_progress = Counter(one.model for one in (*running, *self._loading, *self._loaded))
        with self._lock:
            if not self._waiting:
                return None
            model = min(self._waiting, key=lambda name: (in_progress[name], self._waiting[name][0].arrived))
            generation = self._waiting[model].popleft()
            if not self._waiting[model]:
                del self._waiting[model]
        self._left.append(time.monotonic())
        return generation

    def _settle(self, generation: Generation, future: "Future[ModelLease]", others: bool) -> None:
        was_alone, self._one_at_a_time = self._one_at_a_time, False
        try:
            generation.lease = future.result()
        except NoRoomError as error:
            others = others or bool(self._loading or self._loaded)
            if others or not was_alone:
                self._full, self._one_at_a_time = True, not others
                with self._lock:
                    self._waiting.setdefault(generation.model, deque()).appendleft(generation)
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
