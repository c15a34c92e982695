"""The adapters that are to be combined, checked before anything is computed."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peftcore.adapter import Adapter
from peftcore.errors import AdapterNameError, ConfigError, MergeError
from peftcore.injection.adapter_set import adapter_set
from peftcore.merging.changes import Change, change_of, check_combinable
from peftcore.merging.extra_modules import companions_of


class Sources:
    """Adapters of one model by name; the same name may be given twice.

    Raises AdapterNameError if one is not there or the new name is taken, MergeError if one cannot be combined.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], new_name: str):
        self.names = list(names)
        self.set = adapter_set(model)
        self.set.require(*self.names)
        if new_name in self.set.configs:
            raise AdapterNameError(
                f"there is already an adapter named {new_name!r}; delete it first or take another name"
            )
        for name in self.names:
            if name in self.set.prompts:
                raise MergeError(f"adapter {name!r} is a prompt, which no weight can hold; leave it out")
        self.companions = companions_of(self.set, self.names)
        self.adapters = {name: self.set.of_method(name) for name in self.names}
        for name, own in self.adapters.items():
            for path, adapter in own.items():
                check_combinable(adapter, name, path)
        self.paths = [path for path in self.set.layers if any(path in own for own in self.adapters.values())]
        if not self.paths:
            raise MergeError(f"{self.names} change no layer, so there is nothing to combine")

    def at(self, path: str) -> list[Adapter | None]:
        """Each adapter's at one layer, in order."""
        return [self.adapters[name].get(path) for name in self.names]

    def changes(self) -> Iterator[tuple[str, list[Change | None]]]:
        """What each changes, layer by layer; read only as one asks for the next."""
        for path in self.paths:
            yield path, [None if adapter is None else change_of(adapter) for adapter in self.at(path)]

    def config(self, name: str) -> Any:
        """The configuration of one."""
        return self.set.configs[name]

    def largest_rank(self, path: str | None = None) -> int:
        """The largest rank (count) among the adapters, at one layer or in all; ConfigError if a method has none."""
        ranks: list[int] = []
        for place in self.paths if path is None else [path]:
            for name, adapter in zip(self.names, self.at(place), strict=True):
                rank = 0 if adapter is None else adapter.change_rank
                if rank is None:
                    raise ConfigError(
                        f"adapter {name!r} ({self.config(name).peft_type}) has no rank that the new one could take; "
                        "give the rank to keep, such as 16"
                    )
                ranks.append(rank)
        for config in map(self.config, self.names if path is None else []):
            ranks += config.ranks()
        return max(ranks)

    def check_rank(self, what: str, rank: int | None) -> None:
        """Raise ConfigError for a rank (count) that no layer can have; None is fine."""
        if rank is None:
            return
        bases = [self.set.layers[path].base for path in self.paths]
        most = max(min(b.out_features, b.in_features * math.prod(b.kernel)) for b in bases)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
            raise ConfigError(
                f"{what} must be an integer from 1 to {most}, the most that a layer of these adapters can have; got "
                f"{rank!r}"
            )
