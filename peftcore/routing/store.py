"""Thousands of adapters on disk, and those of them that are in use in the model.

An adapter is in the model under the name of its slot, not under its own, so that a new version can come while requests
still run on the old one. The least recently used slot that nobody holds makes room; where the next adapter has the same
configuration, its weights are copied into the slot that is there, which is several times faster than making one.
"""

import contextlib
import dataclasses
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcore.composition.algebra import Spec, composition
from peftcore.composition.route import Route
from peftcore.config import CONFIG_NAME, PeftConfig
from peftcore.errors import AdapterNameError, AdapterStoreError, CheckpointError
from peftcore.injection import activation, inject
from peftcore.injection.adapter_set import adapter_set
from peftcore.routing.entries import Counts, Entry, Slot, Source
from peftcore.storage import checkpoint

TIMES_KEPT = 1000
"""Loads of which the seconds are kept for the statistics."""


class Lease:
    """An adapter that stays in the model until `release`; also a context manager."""

    def __init__(self, store: "AdapterStore", slot: Slot, version: int):
        self._store, self._slot = store, slot
        self.name = slot.name
        """What the adapter is called in the model: what a route names."""
        self.version = version
        """Which version it is: 1, and one more with each replacement."""
        self._held = True

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        if self._held:
            self._held = False
            self._store._release(self._slot)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterStore:
    """Adapters by name, in a model that holds some of them at a time. Every method may be called by any thread.

    max_loaded: adapters in the model at most (count). max_bytes: bytes of their parameters at most; None: no limit.
    base: what `base_model_name_or_path` of each adapter must say; None: shapes alone are compared.
    """

    def __init__(self, model: nn.Module, max_loaded: int = 64, max_bytes: int | None = None, base: str | None = None):
        if max_loaded < 1 or (max_bytes is not None and max_bytes < 1):
            raise AdapterStoreError(f"max_loaded={max_loaded}, max_bytes={max_bytes}: give at least 1 of each")
        self._model, self._max_loaded, self._max_bytes, self._base = model, max_loaded, max_bytes, base
        self._entries: dict[str, Entry] = {}
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        """In the order of their last use."""
        self._made = 0
        self._counts = Counts()
        self._lock = threading.Condition()
        """Guards what is written here; it is told of whenever a lease ends."""
        self._loading = threading.Lock()
        """Held by the one thread that changes the model."""
        self._prefetcher: ThreadPoolExecutor | None = None

    # -- what there is -------------------------------------------------------------------------------------------

    def register(self, name: str, source: Source, tags: Iterable[str] = ()) -> None:
        """Make an adapter known; nothing of it is read. Raises AdapterNameError for a name that is taken."""
        with self._lock:
            if name in self._entries:
                raise AdapterNameError(f"an adapter {name!r} is registered; replace it, or take another name")
            self._entries[name] = Entry(name, source, tuple(tags))

    def register_directory(self, folder: str | Path) -> list[str]:
        """Register every adapter directory right below a folder by its name; gives the names."""
        found = sorted(path.parent for path in Path(folder).glob(f"*/{CONFIG_NAME}"))
        if not found:
            raise CheckpointError(f"{folder} holds no adapter directories; each has an {CONFIG_NAME}")
        for directory in found:
            self.register(directory.name, directory)
        return [directory.name for directory in found]

    def replace(self, name: str, source: Source) -> None:
        """Give an adapter a new version from now on. What holds the old one goes on with it."""
        with self._lock:
            old = self._entry(name)
            self._entries[name] = Entry(name, source, old.tags, old.version + 1)
            self._retire(old)

    def swap(
        self, name: str, source: Source, tags: Iterable[str] = (), check: Callable[[str], None] | None = None
    ) -> None:
        """Load a new version of an adapter, or a new adapter, and only then let it be `name`.

        Until then, and after an error, `name` stays the version that it was. What holds the old one goes on with it.

        Args:
            name: the adapter's name; it need not be registered yet.
            source: the new version's directory, or what fetches it.
            tags: of an adapter that is not registered yet.
            check: called with the loaded adapter's name in the model; its error refuses the new version.

        Raises:
            CheckpointError: the directory is damaged or fits another base.
            AdapterStoreError: adapters in use leave no room for one more.
        """
        with self._lock:
            old = self._entries.get(name)
        entry = Entry(name, source, tuple(tags)) if old is None else Entry(name, source, old.tags, old.version + 1)
        with self._counting_failures():
            entry.fetch()
            with self._loading:
                slot = self._load(entry, None)
                with self._lock:
                    slot.leases += 1  # nobody's request evicts it before it has its name
        try:
            if check is not None:
                check(slot.name)
            with self._lock:
                if (old := self._entries.get(name)) is not None:
                    self._retire(old)
                self._entries[name] = slot.entry = entry
                entry.slot = slot
        finally:
            self._release(slot)

    def remove(self, name: str) -> None:
        """Forget an adapter. What holds it goes on with it."""
        with self._lock:
            self._retire(self._entry(name))
            del self._entries[name]

    def names(self, tag: str | None = None) -> list[str]:
        """Registered adapters, those with a tag where one is given."""
        with self._lock:
            return [name for name, entry in self._entries.items() if tag is None or tag in entry.tags]

    def loaded(self) -> list[str]:
        """Adapters whose current version is in the model, the least recently used first."""
        with self._lock:
            return [slot.entry.name for slot in self._slots.values() if slot.entry is not None]

    def statistics(self) -> dict[str, Any]:
        """Counts since the start, what is loaded now (count, bytes), and how long loads took (seconds)."""
        with self._lock:
            counts, times = dataclasses.asdict(self._counts), self._counts.seconds
            del counts["seconds"]
            asked = counts["hits"] + counts["misses"]
            return {
                "registered": len(self._entries),
                "loaded": sum(slot.entry is not None for slot in self._slots.values()),
                "in_use": sum(slot.leases > 0 for slot in self._slots.values()),
                "bytes": sum(slot.size for slot in self._slots.values()),
                **counts,
                "hit_rate": counts["hits"] / asked if asked else None,
                "load_seconds_median": statistics.median(times) if times else None,
                "load_seconds_max": max(times) if times else None,
            }

    # -- use -----------------------------------------------------------------------------------------------------

    def acquire(self, name: str, timeout: float | None = None) -> Lease:
        """The adapter in the model, loaded if need be, and there until the lease is released.

        timeout: seconds to wait for room where everything loaded is held; None: not at all. Raises AdapterNameError,
        CheckpointError for a directory that is damaged or fits another base, AdapterStoreError where there is no room.
        """
        with self._lock:
            if (lease := self._held(name)) is not None:
                return lease
            entry = self._entry(name)
        with self._counting_failures():
            entry.fetch()  # what may take long holds up nobody who wants another one
        with self._loading:
            with self._lock:
                if (lease := self._held(name)) is not None:  # another thread has loaded it meanwhile
                    return lease
                entry = self._entry(name)
                self._counts.misses += 1
            started = time.perf_counter()
            with self._counting_failures():
                slot = self._load(entry, timeout)
            with self._lock:
                self._counts.seconds = [*self._counts.seconds[1 - TIMES_KEPT :], time.perf_counter() - started]
                slot.leases += 1
                if self._entries.get(name) is entry:
                    slot.entry, entry.slot = entry, slot
                return Lease(self, slot, entry.version)

    @contextlib.contextmanager
    def using(self, *names: str, timeout: float | None = None) -> Iterator[dict[str, str]]:
        """Gives {name: the adapter's name in the model}; all of them stay there while inside."""
        leases: dict[str, Lease] = {}
        try:
            for name in sorted(set(names)):  # in one order, so that two threads never wait for one another
                leases[name] = self.acquire(name, timeout)
            yield {name: lease.name for name, lease in leases.items()}
        finally:
            for lease in leases.values():
                lease.release()

    @contextlib.contextmanager
    def route(self, given: Spec | Sequence[Spec], timeout: float | None = None) -> Iterator[Route]:
        """`PeftModel.route` by the adapters' registered names, loaded if need be."""
        several = isinstance(given, list | tuple)
        wanted = [composition(one) for one in given] if several else [composition(given)]  # type: ignore[union-attr,arg-type]
        names = {name for one in wanted for name in one.names()}
        with self.using(*names, timeout=timeout) as here:
            renamed = [one.renamed(here) for one in wanted]
            with activation.routed(self._model, renamed if several else renamed[0]) as route:
                yield route

    def pin(self, name: str) -> Lease:
        """Load an adapter and keep it until the lease is released."""
        return self.acquire(name)

    def prefetch(self, *names: str) -> list["Future[None]"]:
        """Load adapters in the background, one after another; a future's error is that of `acquire`."""
        with self._lock:
            self._prefetcher = self._prefetcher or ThreadPoolExecutor(1, "adapter-prefetch")
        return [self._prefetcher.submit(lambda name=name: self.acquire(name).release()) for name in names]

    def close(self) -> None:
        """Wait for what is being prefetched, and take every adapter of the store that nobody holds out of the model."""
        if self._prefetcher is not None:
            self._prefetcher.shutdown(cancel_futures=True)
        with self._loading, self._lock:
            for slot in [slot for slot in self._slots.values() if not slot.leases]:
                self._delete(slot)

    # -- inside --------------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            near = ", ".join(list(self._entries)[:5]) or "none yet"
            raise AdapterNameError(f"no adapter {name!r} is registered; there are {len(self._entries)}: {near} ...")
        return self._entries[name]

    @contextlib.contextmanager
    def _counting_failures(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with self._lock:
                self._counts.failures += 1
            raise

    def _held(self, name: str) -> Lease | None:
        """A lease of an adapter that is in the model."""
        entry = self._entry(name)
        if entry.slot is None:
            return None
        entry.slot.leases += 1
        self._counts.hits += 1
        self._slots.move_to_end(entry.slot.name)
        return Lease(self, entry.slot, entry.version)

    def _release(self, slot: Slot) -> None:
        with self._lock:
            slot.leases -= 1
            if slot.name in self._slots and slot.entry is not None:
                self._slots.move_to_end(slot.name)
            self._lock.notify_all()

    def _retire(self, entry: Entry) -> None:
        """Part an entry from its slot, which is then the first to make room."""
        slot, entry.slot = entry.slot, None
        if slot is not None:
            slot.entry = None
            self._slots.move_to_end(slot.name, last=False)

    def _load(self, entry: Entry, timeout: float | None) -> Slot:
        """Put an adapter into the model; what was evicted for it stays out where that fails."""
        config, tensors = entry.read(self._base)
        slot = self._put(entry, config, tensors, timeout)
        entry.config = config
        return slot

    def _put(self, entry: Entry, config: PeftConfig, tensors: dict[str, Tensor], timeout: float | None) -> Slot:
        size = sum(tensor.numel() for tensor in tensors.values()) * 4
        assert entry.directory is not None
        reused = self._make_room(entry.name, config, size, timeout)
        if reused is not None:
            checkpoint.load_adapter_weights(self._model, entry.directory, reused.name, tensors, False)
            return reused
        self._made += 1
        name = f"{entry.name}@{self._made}".replace(".", "-")
        checkpoint.load_adapter(self._model, entry.directory, name, False, config, tensors, False)
        adapters = adapter_set(self._model)
        slot = Slot(name, config, sum(p.nbytes for p in adapters.parameters(name)))
        with self._lock:
            self._slots[name] = slot
        return slot

    def _make_room(self, name: str, config: PeftConfig, size: int, timeout: float | None) -> Slot | None:
        """Evict until one more fits; a slot of the same configuration is emptied and given instead of taken out."""
        if self._max_bytes is not None and size > self._max_bytes:
            raise AdapterStoreError(
                f"adapter {name!r} has {size:,} bytes of parameters, and the store holds {self._max_bytes:,} at most; "
                "give a larger max_bytes"
            )
        until = time.monotonic() + (timeout or 0)
        with self._lock:
            while not self._has_room(size):
                free = [slot for slot in self._slots.values() if self._is_free(slot)]
                if not free:
                    left = until - time.monotonic()
                    if left <= 0 or not self._lock.wait(left):
                        raise AdapterStoreError(
                            f"no room for adapter {name!r}: all {len(self._slots)} loaded adapters are in use; release "
                            "some, wait (timeout=), or give a larger max_loaded or max_bytes"
                        )
                    continue
                slot = free[0]
                self._counts.evictions += slot.entry is not None
                self._retire_slot(slot)
                if slot.config.can_be_overwritten_by(config) and self._has_room(size, besides=slot):
                    self._slots.move_to_end(slot.name)
                    return slot
                self._delete(slot)
        return None

    def _has_room(self, size: int, besides: Slot | None = None) -> bool:
        """Whether one more of so many bytes fits; besides: a slot that it would take the place of."""
        others = [slot for slot in self._slots.values() if slot is not besides]
        if len(others) >= self._max_loaded:
            return False
        return self._max_bytes is None or sum(slot.size for slot in others) + size <= self._max_bytes

    def _is_free(self, slot: Slot) -> bool:
        return not slot.leases and adapter_set(self._model).selection.in_use[slot.name] <= 0

    def _retire_slot(self, slot: Slot) -> None:
        if slot.entry is not None:
            slot.entry.slot = None
            slot.entry = None

    def _delete(self, slot: Slot) -> None:
        self._retire_slot(slot)
        inject.delete_adapter(self._model, slot.name)
        del self._slots[slot.name]
