"""Changing a module of another package when it is imported, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(module: str, name: str, action: Callable[[Any], None]) -> None:
    """Call `action(module)` at once if the module is imported already, otherwise right after its import.

    Args:
        module: the module's name.
        name: a name that the module defines. A module without this name is still being imported.
        action: a function of the module. A second call with an equal action and module does nothing.
    """
    if hasattr(present := sys.modules.get(module), name):
        action(present)
    elif (finder := _Finder(module, action)) not in sys.meta_path:
        sys.meta_path.insert(0, finder)


class _Finder:
    """Import hook that calls an action on a module after the module's import, once."""

    def __init__(self, module: str, action: Callable[[Any], None]):
        self._module, self._action = module, action

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Finder) and (other._module, other._action) == (self._module, self._action)

    def __hash__(self) -> int:
        return hash((self._module, self._action))

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the import spec of the module; None for every other module."""
        if name != self._module:
            return None
        from importlib.util import find_spec  # here, because it imports much

        sys.meta_path.remove(self)
        spec = find_spec(name)  # by all other finders, of which some may wait for the same module
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module
            loader.exec_module = lambda module: (run(module), self._action(module))
        return spec
