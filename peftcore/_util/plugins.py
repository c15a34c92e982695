"""Import of the modules that register themselves: those of a package, and those of third-party packages."""

import importlib
import importlib.metadata
import pkgutil
from functools import cache


@cache
def import_plugins(packages: tuple[str, ...], group: str) -> None:
    """Import every module of these packages and every entry point of a group, once; importing registers."""
    for name in packages:
        package = importlib.import_module(name)
        for module in pkgutil.iter_modules(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    for entry in importlib.metadata.entry_points(group=group):
        entry.load()
