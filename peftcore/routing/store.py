"""`AdapterStore`: thousands of adapters on disk, and the used ones in the model.

Each adapter in the model is in a slot, and has the slot's name there. So a new version can be loaded while requests
still run on the old one. The least recently used slot without a lease is evicted to make room. If the next adapter has
the same configuration, its weights are copied into that slot, which is several times faster than a new adapter.
"""

import contextlib
import dataclasses
import re
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
from peftcore.storage.reading import Reading

RECORDED_LOADS = 1000
"""Number of last loads whose durations the statistics use."""


class Lease:
    """A hold on a loaded adapter: the adapter stays in the model until `release`. Also a context manager."""

    def __init__(self, store: "AdapterStore", slot: Slot, entry: Entry):
        self._store, self._slot = store, slot
        self.name = slot.name
        """The adapter's name in the model, for routes."""
        self.version = entry.version
        """The adapter's version: 1, and one more with each replacement."""
        assert entry.directory is not None
        self.directory = entry.directory
        """The directory that this version was loaded from."""
        self.weights = (slot.name, slot.loads)
        """Identifies the loaded weights: other weights in this store never have the same value."""
        self._active = True

    def release(self) -> None:
        """End the lease; a second call does nothing."""
        if self._active:
            self._active = False
            self._store._release(self._slot)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterStore:
    """Registered adapters by name, of which a model holds a limited number at a time. All methods are thread-safe.

    Args:
        model: the base model, with or without adapters.
        max_loaded: largest number of adapters in the model (count).
        max_bytes: largest size of their parameters (bytes); None: no limit.
        base: value that each adapter's `base_model_name_or_path` must have; None: only shapes are compared.
        autocast_adapter_dtype: True: float32 parameters on layers of 16 bits, as PEFT loads them. False: the layers'
            dtype, which halves the memory of adapters, and the time that a CPU takes to read them.

    Raises:
        TypeError: the first argument is not a model.
        AdapterStoreError: a limit is below 1.
        ConfigError: autocast_adapter_dtype is neither True nor False.
    """

    def __init__(
        self,
        model: nn.Module,
        max_loaded: int = 64,
        max_bytes: int | None = None,
        base: str | None = None,
        autocast_adapter_dtype: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"AdapterStore needs the base model first; got {model!r:.200}")
        if max_loaded < 1 or (max_bytes is not None and max_bytes < 1):
            raise AdapterStoreError(f"max_loaded and max_bytes must be at least 1; got {max_loaded} and {max_bytes}")
        self._model, self._max_loaded, self._max_bytes, self._base = model, max_loaded, max_bytes, base
        self._reading = Reading(autocast_adapter_dtype)
        self._itemsize = 4 if autocast_adapter_dtype else _largest_itemsize(model)
        """Largest size of an adapter's number (bytes)."""
        self._entries: dict[str, Entry] = {}
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        """Slots by their name in the model, the least recently used first."""
        self._slots_created = 0
        self._counts = Counts()
        self._lock = threading.Condition()
        """Guards the store's fields; notified whenever a lease ends."""
        self._loading = threading.Lock()
        """Held by the thread that changes the model."""
        self._prefetcher: ThreadPoolExecutor | None = None

    # -- registration --------------------------------------------------------------------------------------------

    def register(self, name: str, source: Source, tags: Iterable[str] = ()) -> None:
        """Register an adapter without reading its files.

        Args:
            name: the adapter's name.
            source: its directory, or a function that fetches one and returns its path.
            tags: labels for `names`.

        Raises:
            AdapterNameError: the name is registered already.
        """
        with self._lock:
            if name in self._entries:
                raise AdapterNameError(f"adapter {name!r} is registered already; replace it, or take another name")
            self._entries[name] = Entry(name, source, tuple(tags))

    def register_directory(self, folder: str | Path) -> list[str]:
        """Register every adapter directory directly below a folder under its own name, and return the names."""
        directories = sorted(path.parent for path in Path(folder).glob(f"*/{CONFIG_NAME}"))
        if not directories:
            raise CheckpointError(f"{folder} holds no adapter directories; each has an {CONFIG_NAME}")
        for directory in directories:
            self.register(directory.name, directory)
        return [directory.name for directory in directories]

    def replace(self, name: str, source: Source) -> None:
        """Register a new version of an adapter; current leases keep the old version."""
        with self._lock:
            old = self._entry(name)
            self._entries[name] = Entry(name, source, old.tags, old.version + 1)
            self._retire(old)

    def swap(
        self, name: str, source: Source, tags: Iterable[str] = (), check: Callable[[str], None] | None = None
    ) -> None:
        """Load a new version of an adapter, and register it after it has been loaded and checked.

        If an error occurs, the old version stays registered. Current leases keep the old version.

        Args:
            name: the adapter's name; an unknown name registers a new adapter.
            source: the new version's directory, or a function that fetches it and returns its path.
            tags: labels of a new adapter.
            check: called with the loaded adapter's name in the model; an exception refuses the new version.

        Raises:
            CheckpointError: the directory is damaged or is of another base.
            AdapterStoreError: every slot has a lease, so there is no room.
        """
        with self._lock:
            old = self._entries.get(name)
        entry = Entry(name, source, tuple(tags)) if old is None else Entry(name, source, old.tags, old.version + 1)
        with self._counting_failures():
            entry.fetch()
            with self._loading:
                slot = self._load(entry, None)
                with self._lock:
                    slot.leases += 1  # so that no other request evicts the slot before it is registered
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
        """Unregister an adapter; current leases keep it."""
        with self._lock:
            self._retire(self._entry(name))
            del self._entries[name]

    def names(self, tag: str | None = None) -> list[str]:
        """Return the names of all registered adapters, or of those with a tag."""
        with self._lock:
            return [name for name, entry in self._entries.items() if tag is None or tag in entry.tags]

    def loaded(self) -> list[str]:
        """Return the names of adapters whose current version is in the model, the least recently used first."""
        with self._lock:
            return [slot.entry.name for slot in self._slots.values() if slot.entry is not None]

    def statistics(self) -> dict[str, Any]:
        """Return figures of the store by name.

        Returns:
            Counters since the store was created; the registered, loaded and leased adapters (counts) and their bytes;
            `hit_rate`; and median and maximum duration (seconds) of the last RECORDED_LOADS loads. Figures without a
            request or a load are None.
        """
        with self._lock:
            counts, times = dataclasses.asdict(self._counts), self._counts.seconds
            del counts["seconds"]
            requests = counts["hits"] + counts["misses"]
            return {
                "registered": len(self._entries),
                "loaded": sum(slot.entry is not None for slot in self._slots.values()),
                "in_use": sum(slot.leases > 0 for slot in self._slots.values()),
                "bytes": sum(slot.size for slot in self._slots.values()),
                **counts,
                "hit_rate": counts["hits"] / requests if requests else None,
                "load_seconds_median": statistics.median(times) if times else None,
                "load_seconds_max": max(times) if times else None,
            }

    # -- use -----------------------------------------------------------------------------------------------------

    def acquire(self, name: str, timeout: float | None = None) -> Lease:
        """Load an adapter if necessary, and return a lease that keeps it in the model.

        Args:
            name: the adapter's name.
            timeout: seconds to wait for room if every slot has a lease; None: do not wait.

        Raises:
            AdapterNameError: the adapter is not registered.
            CheckpointError: its directory is damaged or is of another base.
            AdapterStoreError: there is no room.
        """
        with self._lock:
            if (lease := self._lease_if_loaded(name)) is not None:
                return lease
            entry = self._entry(name)
        with self._counting_failures():
            entry.fetch()  # outside of the lock: a slow download does not block requests for other adapters
        with self._loading:
            with self._lock:
                if (lease := self._lease_if_loaded(name)) is not None:  # loaded by another thread in the meantime
                    return lease
                entry = self._entry(name)
            started = time.perf_counter()
            with self._counting_failures():
                slot = self._load(entry, timeout)
            with self._lock:
                self._counts.misses += 1
                self._counts.seconds = [*self._counts.seconds[1 - RECORDED_LOADS :], time.perf_counter() - started]
                slot.leases += 1
                if self._entries.get(name) is entry:
                    slot.entry, entry.slot = entry, slot
                return Lease(self, slot, entry)

    @contextlib.contextmanager
    def using(self, *names: str, timeout: float | None = None) -> Iterator[dict[str, str]]:
        """Lease several adapters for the duration of the context; yields {name: the adapter's name in the model}."""
        leases: dict[str, Lease] = {}
        try:
            for name in sorted(set(names)):  # one order in all threads, so that they cannot deadlock
                leases[name] = self.acquire(name, timeout)
            yield {name: lease.name for name, lease in leases.items()}
        finally:
            for lease in leases.values():
                lease.release()

    @contextlib.contextmanager
    def route(self, spec: Spec | Sequence[Spec], timeout: float | None = None) -> Iterator[Route]:
        """Route like `PeftModel.route`, by registered names; the adapters are loaded if necessary and leased."""
        several = isinstance(spec, list | tuple)
        rows = [composition(row) for row in spec] if several else [composition(spec)]  # type: ignore[union-attr,arg-type]
        names = {name for row in rows for name in row.names()}
        with self.using(*names, timeout=timeout) as names_in_model:
            renamed = [row.renamed(names_in_model) for row in rows]
            with activation.routed(self._model, renamed if several else renamed[0]) as route:
                yield route

    def pin(self, name: str) -> Lease:
        """Load an adapter, and return a lease that keeps it in the model."""
        return self.acquire(name)

    def prefetch(self, *names: str) -> list["Future[None]"]:
        """Load adapters in the background, one after another; a future raises the errors of `acquire`."""
        with self._lock:
            self._prefetcher = self._prefetcher or ThreadPoolExecutor(1, "adapter-prefetch")
        return [self._prefetcher.submit(lambda name=name: self.acquire(name).release()) for name in names]

    def close(self) -> None:
        """Wait for the running prefetch, and delete every adapter without a lease from the model."""
        if self._prefetcher is not None:
            self._prefetcher.shutdown(cancel_futures=True)
        with self._loading, self._lock:
            for slot in [slot for slot in self._slots.values() if not slot.leases]:
                self._delete(slot)

    # -- internals -----------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            first = ", ".join(list(self._entries)[:5]) or "none yet"
            raise AdapterNameError(f"no adapter {name!r} is registered; there are {len(self._entries)}: {first} ...")
        return self._entries[name]

    @contextlib.contextmanager
    def _counting_failures(self) -> Iterator[None]:
        """Count an error as a failure of an adapter, but not the lack of room: the caller may try again."""
        try:
            yield
        except AdapterStoreError:
            raise
        except BaseException:
            with self._lock:
                self._counts.failures += 1
            raise

    def _lease_if_loaded(self, name: str) -> Lease | None:
        """Lease an adapter if its current version is in the model; otherwise return None."""
        entry = self._entry(name)
        if entry.slot is None:
            return None
        entry.slot.leases += 1
        self._counts.hits += 1
        self._slots.move_to_end(entry.slot.name)
        return Lease(self, entry.slot, entry)

    def _release(self, slot: Slot) -> None:
        with self._lock:
            slot.leases -= 1
            if slot.name in self._slots and slot.entry is not None:
                self._slots.move_to_end(slot.name)
            self._lock.notify_all()

    def _retire(self, entry: Entry) -> None:
        """Detach an entry from its slot, which makes the slot the next one to be evicted."""
        slot, entry.slot = entry.slot, None
        if slot is not None:
            slot.entry = None

    def _load(self, entry: Entry, timeout: float | None) -> Slot:
        """Load an adapter into the model; slots that were evicted for it stay empty if loading fails."""
        with self._lock:  # before the files are read, because a server asks again and again
            if not timeout and len(self._slots) >= self._max_loaded and not self._idle():
                raise self._no_room(entry.name)
        config, tensors = entry.read(self._base)
        slot = self._fill_slot(entry, config, tensors, timeout)
        entry.config = config
        return slot

    def _fill_slot(self, entry: Entry, config: PeftConfig, tensors: dict[str, Tensor], timeout: float | None) -> Slot:
        size = sum(tensor.numel() for tensor in tensors.values()) * self._itemsize
        assert entry.directory is not None
        reused = self._make_room(entry.name, config, size, timeout)
        if reused is not None:
            reused.loads += 1
            checkpoint.load_adapter_weights(self._model, entry.directory, reused.name, tensors, False, self._reading)
            return reused
        self._slots_created += 1
        name = re.sub(r"[./]", "-", f"{entry.name}@{self._slots_created}")
        checkpoint.load_adapter(self._model, entry.directory, name, False, config, tensors, False, self._reading)
        adapters = adapter_set(self._model)
        slot = Slot(name, config, sum(p.nbytes for p in adapters.parameters(name)))
        with self._lock:
            self._slots[name] = slot
        return slot

    def _make_room(self, name: str, config: PeftConfig, size: int, timeout: float | None) -> Slot | None:
        """Evict slots until one more adapter fits; return an evicted slot of equal configuration for reuse, or None.

        Slots of replaced and removed adapters go first, also if there is room.
        """
        if self._max_bytes is not None and size > self._max_bytes:
            raise AdapterStoreError(
                f"adapter {name!r} has {size:,} bytes of parameters, and the store's limit is {self._max_bytes:,}; "
                "give a larger max_bytes"
            )
        deadline = time.monotonic() + (timeout or 0)
        with self._lock:
            while True:
                idle = self._idle()
                if not (idle and idle[0].entry is None) and self._has_room(size):
                    return None
                if not idle:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._lock.wait(left):
                        raise self._no_room(name)
                    continue
                slot = idle[0]
                self._counts.evictions += slot.entry is not None
                self._empty(slot)
                if slot.config.can_be_overwritten_by(config) and self._has_room(size, reused=slot):
                    self._slots.move_to_end(slot.name)
                    return slot
                self._delete(slot)

    def _has_room(self, size: int, reused: Slot | None = None) -> bool:
        """Return True if an adapter of `size` bytes fits, in a new slot or in a reused one."""
        other_slots = [slot for slot in self._slots.values() if slot is not reused]
        if len(other_slots) >= self._max_loaded:
            return False
        return self._max_bytes is None or sum(slot.size for slot in other_slots) + size <= self._max_bytes

    def _idle(self) -> list[Slot]:
        """Return the slots that may be evicted: those without an entry, then the least recently used first."""
        if not self._slots:  # the model may have no adapters yet
            return []
        in_use = adapter_set(self._model).selection.in_use
        idle = [slot for slot in self._slots.values() if not slot.leases and in_use[slot.name] <= 0]
        return sorted(idle, key=lambda slot: slot.entry is not None)

    def _no_room(self, name: str) -> AdapterStoreError:
        return AdapterStoreError(
            f"no room for adapter {name!r}: all {len(self._slots)} loaded adapters are in use; release some, wait "
            "(timeout=), or give a larger max_loaded or max_bytes"
        )

    def _empty(self, slot: Slot) -> None:
        if slot.entry is not None:
            slot.entry.slot = None
            slot.entry = None

    def _delete(self, slot: Slot) -> None:
        self._empty(slot)
        inject.delete_adapter(self._model, slot.name)
        del self._slots[slot.name]


def _largest_itemsize(model: nn.Module) -> int:
    """Return the size of the model's largest floating-point numbers (bytes), at most float32's."""
    return min(4, max((p.itemsize for p in model.parameters() if p.is_floating_point()), default=4))
