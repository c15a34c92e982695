"""Base class of the three wrappers: `AdapterLayer`, `AdapterParameters`, `SavedModule`; and the walk over a model's original modules."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peftcore.layers.active import Selection


class NamedModules(nn.Module):
    """Modules by any name. (`nn.ModuleDict` refuses names like "keys" or "type" that are its attributes.)"""

    changes = 0
    """How often one was put in or taken out (count)."""

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def get(self, name: str) -> Any:
        """The module, or None."""
        return self._modules.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):  # as `set_submodule` replaces one
            self.__dict__["changes"] = self.changes + 1

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module
        self.__dict__["changes"] = self.changes + 1  # not by nn.Module's own assignment, which is slow

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        self.__dict__["changes"] = self.changes + 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class Prompts(NamedModules):
    """A model's prompt learners by adapter name: a submodule of the model, but no part of the base."""

    is_no_part_of_the_base = True


class LayerWrapper(nn.Module):
    """A module that stands in for `base_layer` and lets the model's code read its attributes."""

    base_layer: nn.Module
    exposes_children = False
    """Whether modules inside the base layer can be adapted too."""
    rows_first: bool | None = (
        None  # not `batch_first`: models read that one of nn.MultiheadAttention, through this wrapper
    )
    """Whether its rows come before their tokens; None: not known yet, see `peftcore.detection.layer_inputs`."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.path = ""
        """Where it stands in the model: at the first place, if at several."""
        self.train(base_layer.training)

    def sees_tokens(self, x: Tensor) -> bool:
        """Whether an input of this shape has an axis of tokens besides that of rows."""
        return x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())

    def _stands_for(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            protocol = name.startswith("__")  # a parametrised layer has its own __deepcopy__; a wrapper is copied whole
            if protocol or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._stands_for(), name)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that a wrapper stands for; any other module itself."""
    return module.base_layer if isinstance(module, LayerWrapper) else module


def original_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a model as it was before injection: each wrapper is given, and nothing inside it but what stands
    inside of a module whose raw parameters are adapted.

    A module that stands at several paths is given once for each.
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
