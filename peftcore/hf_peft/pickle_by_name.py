"""Modules that pickle as an import, whatever the pickler.

dill, with which `datasets.Dataset.map` hashes a function, pickles the modules among a function's global names by their
content, unless they lie in `site-packages`. A module's content has parts that no pickler can save, such as
thread-local objects, and changes while a program runs.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class _PickledByName(ModuleType):
    """A package or module that pickles as an import, and passes this on to its submodules."""

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        return import_module, (self.__name__,)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType):  # set by the import of a submodule
            _pass_on(self, name)


def pickle_by_name(module: ModuleType) -> None:
    """Make a module, its submodules and those imported later pickle as an import.

    Args:
        module: A package or module that is in `sys.modules` under its `__name__`.
    """
    module.__class__ = _PickledByName
    for name in list(vars(module)):
        _pass_on(module, name)


def _pass_on(module: ModuleType, name: str) -> None:
    submodule = sys.modules.get(f"{module.__name__}.{name}")  # a function may have the same name
    if type(submodule) is ModuleType:
        pickle_by_name(submodule)
