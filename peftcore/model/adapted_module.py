"""Base class of the method groups of `PeftModel`: its module, configurations, and names of active adapters."""

from typing import Any

from torch import nn

from peftcore.config import PeftConfig
from peftcore.injection.adapter_set import adapter_set


class _ActiveAdapters(list[str]):
    """A list, as in PEFT, that is also callable, because transformers has a method of this name."""

    def __call__(self) -> list[str]:
        return list(self)


class AdaptedModule:
    """A module with adapters: base class of the classes that hold the methods of `PeftModel`."""

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """{adapter: configuration}."""
        return adapter_set(self._module).configs

    @property
    def active_adapters(self) -> Any:
        """Names of the active adapters, in order: a list that is also callable, as in transformers."""
        return _ActiveAdapters(adapter_set(self._module).selection.active)

    @property
    def active_adapter(self) -> str:
        """Name of the first active adapter; '' if none is active."""
        return next(iter(adapter_set(self._module).selection.active), "")

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self
