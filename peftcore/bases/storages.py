"""Registry of the views of layers and weights that other packages define, such as quantised ones.

Every file of `peftcore.bases` registers its views. A third-party package registers views through entry points of the
group `peftcore.storages`: the entry's value is the module to import. A class is given as `package.Class`, the top-level
package and the name of the class, so that the package is not imported before a model has such a layer.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from peftcore._util.plugins import import_plugins
from peftcore.bases.base import BaseWeight
from peftcore.errors import ConfigError

ENTRY_POINTS = "peftcore.storages"

View = TypeVar("View", bound=type[BaseWeight])

_views: dict[str, type[BaseWeight]] = {}


def register_storage(*classes: str) -> Callable[[View], View]:
    """Return a class decorator that registers a view for some classes and their subclasses.

    Args:
        classes: Classes of layers, or of the parameter `weight` of `nn.Linear`, as `package.Class`: the top-level
            package and the name of the class, such as "hqq.HQQLinear". The class of a weight has precedence.

    Raises:
        ConfigError: A class is not of this form, or has another view already.
    """
    for name in classes:
        if len(name.split(".")) != 2 or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                f"register_storage: {name!r} is no top-level package and class; give a name such as 'hqq.HQQLinear'"
            )

    def add(view: View) -> View:
        for name in classes:
            known = _views.setdefault(name, view)
            if (known.__module__, known.__qualname__) != (view.__module__, view.__qualname__):
                raise ConfigError(
                    f"register_storage: {name} has the view {known.__module__}.{known.__qualname__} already, so "
                    f"{view.__module__}.{view.__qualname__} cannot be its view, too"
                )
            _views[name] = view
        return view

    return add


def registered_view(layer: nn.Module) -> type[BaseWeight] | None:
    """Return the view that is registered for the class of a layer's weight, or of the layer; None if there is none."""
    import_plugins(("peftcore.bases",), ENTRY_POINTS)
    weight = getattr(layer, "weight", None)
    classes = (*type(weight).__mro__, *type(layer).__mro__)
    names = (f"{each.__module__.partition('.')[0]}.{each.__qualname__}" for each in classes)
    return next((_views[name] for name in names if name in _views), None)


def registered_classes() -> list[str]:
    """Return the classes of all registered views, such as "hqq.HQQLinear", in alphabetical order."""
    import_plugins(("peftcore.bases",), ENTRY_POINTS)
    return sorted(_views)
