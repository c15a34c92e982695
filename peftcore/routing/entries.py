"""Records of an adapter store: registered adapters (`Entry`), adapters in the model (`Slot`) and counters."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peftcore.config import PeftConfig
from peftcore.errors import CheckpointError
from peftcore.files.tensors import WEIGHTS_NAME, read_tensors

Source = Path | str | Callable[[], Path]
"""A directory in PEFT's format, or a function that fetches one and returns its path, such as from a DVC remote."""


@dataclass
class Entry:
    """A registered adapter, in its current version."""

    name: str
    source: Source
    tags: tuple[str, ...]
    version: int = 1
    slot: "Slot | None" = None
    directory: Path | None = None
    """The fetched directory; None before `fetch`."""
    config: PeftConfig | None = None
    """The configuration; None before the first successful load, which checks the manifest too."""
    fetching: threading.Lock = field(default_factory=threading.Lock)

    def fetch(self) -> Path:
        """Return the adapter's directory; the first call fetches it."""
        with self.fetching:
            if self.directory is None:
                self.directory = Path(self.source() if callable(self.source) else self.source)
            return self.directory

    def read(self, base: str | None) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Fetch and check the adapter, and return its configuration and tensors.

        Raises:
            CheckpointError: the directory is damaged, changes the base, or is not of `base` (None: any base).
        """
        directory = self.fetch()
        config = self.config or PeftConfig.from_pretrained(directory)
        if change := _changes_the_base(config):
            raise CheckpointError(f"{directory} {change}, which would affect every other adapter of the base; merge it")
        if base is not None and config.base_model_name_or_path != base:
            raise CheckpointError(
                f"{directory} was trained on {config.base_model_name_or_path!r}, and this store is for {base!r}; train "
                "the adapter on that base, or make the store with base=None"
            )
        tensors = read_tensors(directory, check_manifest=self.config is None)
        if key := _not_finite(tensors):
            raise CheckpointError(f"{directory / WEIGHTS_NAME}: {key} is not finite; load an earlier version")
        return config, tensors


@dataclass
class Slot:
    """One adapter name in the model, under which the store loads registered adapters, one at a time."""

    name: str
    """The adapter's name in the model."""
    config: PeftConfig
    size: int
    """Bytes of its parameters."""
    leases: int = 0
    loads: int = 1
    """Adapters that have been loaded into this slot so far (count)."""
    entry: Entry | None = None
    """The registered adapter in this slot; None if the slot holds an old version or nothing."""


@dataclass
class Counts:
    """Counters of an adapter store since its creation."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    seconds: list[float] = field(default_factory=list)
    """Durations of the last loads."""


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return the key of a tensor that holds NaN or Inf; None if there is none."""
    every = [tensor.flatten() for tensor in tensors.values()]
    if not every or bool(torch.cat(every).isfinite().all()):  # one check for hundreds of small tensors
        return None
    return next(key for key, tensor in tensors.items() if not bool(tensor.isfinite().all()))


def _changes_the_base(config: PeftConfig) -> str:
    """Return the way in which an adapter changes the base model itself, as text; "" if it does not."""
    if config.replaces_base:
        return "replaces the base's weights by its initialisation"
    return "makes the base deeper (layer_replication)" if config.layer_replication else ""
