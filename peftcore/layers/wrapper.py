"""The base class of the wrappers, and the walk over a model's original modules.

There are exactly three wrappers, each in a file of its own. A wrapper replaces a module of the model, holds that module
as `base_layer`, and passes attribute reads on to that module.

    AdapterLayer        a layer with adapters: linear, convolution, embedding, norm   `adapter_layer.py`
    AdapterParameters   a module with adapters on raw parameters, such as experts     `adapter_parameters.py`
    SavedModule         a module with one trainable copy per adapter                  `saved_module.py`
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peftcore._util import adapter_changes
from peftcore.composition.route import Route
from peftcore.detection.layer_inputs import rows_come_first
from peftcore.errors import RoutingError
from peftcore.layers.active import Selection

_ACCELERATE = frozenset({"_hf_hook", "_old_forward"})
"""What accelerate keeps on each module that it has hooked, and looks for when it removes its hooks."""


class NamedModules(nn.ModuleDict):
    """Modules by name; more names are allowed than in other `nn.ModuleDict`s, such as "keys" or "type"."""

    changes = 0
    """Additions, replacements and removals so far (count)."""

    def get(self, name: str) -> Any:
        """Return the module of this name, or None."""
        return self._modules.get(name)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):  # `set_submodule` replaces a module by assignment
            self._note_change()

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module
        self._note_change()

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        self._note_change()

    def _note_change(self) -> None:
        self.__dict__["changes"] = self.changes + 1  # nn.Module's own assignment is slow
        adapter_changes.note()


class Prompts(NamedModules):
    """Prompt learners by adapter name: a submodule of the model that is no part of the base model."""

    is_no_part_of_the_base = True


class LayerWrapper(nn.Module):
    """A module that stands in place of `base_layer`.

    Args:
        base_layer: the module that is wrapped.
        selection: the adapters in effect, shared by all wrappers of a model.
    """

    base_layer: nn.Module
    exposes_children = False
    """True if modules inside of the base layer can be adapted too."""
    rows_first: bool | None = None
    """True if the axis of rows is the first one; None if not known yet.

    `peftcore.detection.layer_inputs.rows_come_first` infers it from the model. The name is not `batch_first`, because
    models read that attribute of nn.MultiheadAttention through the wrapper.
    """

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.path = ""
        """Path in the model; the first one if the module stands at several paths."""
        self.train(base_layer.training)

    def sees_tokens(self, x: Tensor) -> bool:
        """Return True if x has an axis of tokens besides the axis of rows."""
        return x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())

    def check_rows(self, x: Tensor, route: Route) -> None:
        """Check that each row of x can be matched with a row of the batch.

        Args:
            x: the layer's input, rows on the first axis.
            route: the compositions of the batch's rows.

        Raises:
            RoutingError: the number of rows does not fit the batch, or the first two axes cannot be told apart.
        """
        if route.uniform is not None:
            return
        rows = route.rows or len(route.compositions)
        known = route.rows is not None
        fits = len(x) == rows or (len(x) in route.flattened and x.dim() == 2 if known else len(x) % rows == 0)
        if not fits:
            raise RoutingError(
                f"{self.path} sees {len(x)} rows and the batch has {rows}, so the rows cannot be matched; leave this "
                "layer out of target_modules, or give all rows of a batch the same adapter"
            )
        if x.dim() > 1 and x.shape[1] == rows and self.sees_tokens(x) and not self._rows_come_first(route):
            raise RoutingError(
                f"{self.path} sees {tuple(x.shape[:2])} and the batch has {rows} rows, so rows may be the first or the "
                "second axis; if they are the first, set batch_first=True on the model or on the module around this "
                "layer; otherwise give all rows of a batch the same adapter"
            )
        if self.rows_first is None and x.dim() == 3 and len(x) == route.rows != x.shape[1]:
            self.rows_first = True

    def _rows_come_first(self, route: Route) -> bool:
        if self.rows_first is None and route.model is not None:
            self.rows_first = rows_come_first(route.model, self.path)
        return bool(self.rows_first)

    def _stands_for(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # not `__deepcopy__` and the like: a parametrised layer defines that one, and a wrapper must be copied whole
            is_of_one_module = name.startswith("__") or name in _ACCELERATE
            if is_of_one_module or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._stands_for(), name)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the base layer of a wrapper; any other module itself."""
    return module.base_layer if isinstance(module, LayerWrapper) else module


def original_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of a model at the paths from before injection.

    A wrapper is yielded in place of its base layer. Modules inside of a wrapper are yielded only if the wrapper
    `exposes_children`. A module that stands at several paths is yielded once for each.
    """
    for name, child in model._modules.items():
        if child is None or isinstance(child, Prompts):
            continue
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, LayerWrapper):
            yield from original_modules(child, f"{path}.")
        elif child.exposes_children:
            yield from original_modules(child.base_layer, f"{path}.")
