"""The only hosts: `AdaptedLayer` around a base layer, `SavedModule` around a module trained whole.

With adapters 1..n acting in order, the layer computes f_n where f_0 is the base and
f_k(x) = after_k(x, f_{k-1}(before_k(x))), which is what merging them one after another into W gives.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight, base_weight
from peftcore.bases.base import UNMERGED


class Selection:
    """Which adapters act; one object shared by every host of a model, so that switching is one assignment."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.disabled = False

    @property
    def acting(self) -> tuple[str, ...]:
        """Names in the order in which they act; () while disabled."""
        return () if self.disabled else self.active


class NamedModules(nn.Module):
    """Modules by any name. (`nn.ModuleDict` refuses names like "keys" or "type" that are its attributes.)"""

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class _Host(nn.Module):
    """A module that stands in for `base_layer` and lets the model's code read its attributes."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.train(base_layer.training)

    def _stands_for(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._stands_for(), name)


class AdaptedLayer(_Host):
    """A base layer, its adapters by name, and what of them is merged into its weight."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.adapters = NamedModules()
        self.merged: tuple[str, ...] = ()

    @property
    def base(self) -> BaseWeight:
        return base_weight(self.base_layer)

    @property
    def unmerged_state(self) -> dict[str, Any] | None:
        """The base's own parameters while adapters are merged (one more copy of the weight in memory)."""
        return self.base_layer.__dict__.get(UNMERGED)

    @unmerged_state.setter
    def unmerged_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            self.base_layer.__dict__.pop(UNMERGED, None)
        else:
            self.base_layer.__dict__[UNMERGED] = state

    def acting(self) -> list[Adapter]:
        """Adapters of this layer that act and are not merged, in order."""
        adapters = self.adapters._modules
        return [adapters[n] for n in self.selection.acting if n in adapters and n not in self.merged]  # type: ignore[misc]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.acting()
        inputs: list[Tensor] = []
        for adapter in reversed(acting):
            inputs.append(x)
            x = adapter.before(x)
        y = self.base_layer(x, *args, **kwargs)
        for adapter in acting:
            y = adapter.after(inputs.pop(), y)
        return y


class SavedModule(_Host):
    """`modules_to_save`: one whole trainable copy per adapter; the original where no active adapter has one."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.copies = NamedModules()

    def current(self) -> nn.Module:
        """The module that acts now: the first active adapter's copy, or the original."""
        names = [name for name in self.selection.acting if name in self.copies]
        return self.copies[names[0]] if names else self.base_layer

    def _stands_for(self) -> nn.Module:
        return self.current()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)


def modules_outside_hosts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a model as it was before injection: each host is given, nothing inside it.

    A module that stands at several paths is given once for each.
    """
    for name, child in model._modules.items():
        if child is None:
            continue
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, _Host):
            yield from modules_outside_hosts(child, f"{path}.")
