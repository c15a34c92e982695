"""What an adapter store knows of each adapter: where it comes from, what it holds, and where it is in the model."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peftcore._util.tensors import WEIGHTS_NAME, read_tensors
from peftcore.config import PeftConfig
from peftcore.errors import CheckpointError

Source = Path | str | Callable[[], Path]
"""A directory in PEFT's format, or what fetches one, such as from a DVC remote."""


@dataclass
class Entry:
    """One registered adapter, in its current version."""

    name: str
    source: Source
    tags: tuple[str, ...]
    version: int = 1
    slot: "Slot | None" = None
    directory: Path | None = None
    """Where it lies, once it has been fetched."""
    config: PeftConfig | None = None
    """Once it has been read; the manifest has then been checked too."""
    fetching: threading.Lock = field(default_factory=threading.Lock)

    def fetch(self) -> Path:
        """Where it lies, fetched if it has not been yet."""
        with self.fetching:
            if self.directory is None:
                self.directory = Path(self.source() if callable(self.source) else self.source)
            return self.directory

    def read(self, base: str | None) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Configuration and tensors, fetched if need be and checked; base: the one that it must have been trained on.

        Raises CheckpointError for what is damaged, changes the base, or is of another one.
        """
        directory = self.fetch()
        config = self.config or PeftConfig.from_pretrained(directory)
        if unfit := _changes_the_base(config):
            raise CheckpointError(f"{directory} {unfit}, which every other adapter of the base would have too")
        if base is not None and config.base_model_name_or_path != base:
            raise CheckpointError(
                f"{directory} was trained on {config.base_model_name_or_path!r}, and this store is for {base!r}; train "
                "it on that, or give the store no base"
            )
        tensors = read_tensors(directory, check_manifest=self.config is None)
        if wrong := _not_finite(tensors):
            raise CheckpointError(f"{directory / WEIGHTS_NAME}: {wrong} is not finite; load an earlier version")
        return config, tensors


@dataclass
class Slot:
    """An adapter in the model."""

    name: str
    """Its name in the model."""
    config: PeftConfig
    size: int
    """Bytes of its parameters."""
    leases: int = 0
    entry: Entry | None = None
    """What it holds; None for an old version, or for nothing."""


@dataclass
class Counts:
    """What has happened since the store was made."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of the last loads."""


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The key of a tensor that holds NaN or Inf; None where all are numbers."""
    every = [tensor.flatten() for tensor in tensors.values()]
    if not every or bool(torch.cat(every).isfinite().all()):  # at once, for there are hundreds of small ones
        return None
    return next(key for key, tensor in tensors.items() if not bool(tensor.isfinite().all()))


def _changes_the_base(config: PeftConfig) -> str:
    """What a configuration does to the base itself; "" for nothing."""
    if config.replaces_base:
        return "replaces the base's weights by its initialisation"
    return "makes the base deeper (layer_replication)" if config.layer_replication else ""
