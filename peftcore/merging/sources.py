"""The adapters to merge, checked before anything is computed."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.errors import AdapterNameError, ConfigError, MergeError, PromptMergeError
from peftcore.injection.adapter_set import adapter_set
from peftcore.merging.extra_modules import extra_modules_of
from peftcore.merging.weight_changes import Change, change_of, check_replaceable


class Sources:
    """The source adapters of a merge, by name; a name may occur twice.

    Raises:
        AdapterNameError: an adapter does not exist, or the new name is taken.
        MergeError: an adapter cannot be merged.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], new_name: str):
        self.names = list(names)
        self.set = adapter_set(model)
        self.set.require(*self.names)
        if new_name in self.set.configs:
            raise AdapterNameError(f"an adapter named {new_name!r} exists already; delete it or take another name")
        for name in self.names:
            if name in self.set.prompts:
                raise PromptMergeError(f"adapter {name!r} is a prompt, which changes no weight; leave it out")
        self.extra_modules = extra_modules_of(self.set, self.names)
        self.adapters = {name: self.set.of_method(name) for name in self.names}
        for name, by_path in self.adapters.items():
            for path, adapter in by_path.items():
                check_replaceable(adapter, name, path)
        self.paths = [path for path in self.set.layers if any(path in own for own in self.adapters.values())]
        if not self.paths:
            raise MergeError(f"{self.names} change no layer, so there is nothing to merge")

    def at(self, path: str) -> list[Adapter | None]:
        """Return the adapters at one layer, in the order of `names`; None for an adapter that is not there."""
        return [self.adapters[name].get(path) for name in self.names]

    def changes(self) -> Iterator[tuple[str, list[Change | None]]]:
        """Yield (path, one change for each adapter) layer by layer; a layer is read when it is asked for."""
        for path in self.paths:
            yield path, [None if adapter is None else change_of(adapter) for adapter in self.at(path)]

    def config(self, name: str) -> Any:
        """Return the configuration of one adapter."""
        return self.set.configs[name]

    def largest_rank(self, path: str | None = None) -> int:
        """Return the largest rank (count) of the adapters: at the layer `path`, or over all layers if `path` is None.

        Raises:
            ConfigError: an adapter has no rank, because its method is not low-rank.
        """
        ranks: list[int] = []
        for layer in self.paths if path is None else [path]:
            for name, adapter in zip(self.names, self.at(layer), strict=True):
                rank = 0 if adapter is None else adapter.change_rank
                if rank is None:
                    raise ConfigError(
                        f"adapter {name!r} ({self.config(name).method}) has no rank that the new adapter could "
                        "take; give a rank, such as 16"
                    )
                ranks.append(rank)
        for config in map(self.config, self.names if path is None else []):
            ranks += config.ranks()
        return max(ranks)

    def check_rank(self, option: str, rank: int | None) -> None:
        """Raise ConfigError for a rank (count) that no layer can have; None is valid."""
        if rank is not None:
            check_rank(option, rank, [self.set.layers[path].base for path in self.paths])


def check_rank(option: str, rank: int, bases: Sequence[BaseWeight]) -> None:
    """Raise ConfigError for a rank (count) that a change of none of these weights can have."""
    largest = max(min(b.out_features, b.in_features * math.prod(b.kernel)) for b in bases)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= largest:
        raise ConfigError(
            f"{option} must be an integer from 1 to {largest}, the largest rank of a layer of these adapters; got "
            f"{rank!r}"
        )
