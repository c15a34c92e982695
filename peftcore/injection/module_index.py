"""The index of a model's modules by path. It is built once per operation, whatever the number of loaded adapters."""

from functools import cached_property

from torch import nn

from peftcore.layers.wrapper import original_modules, unwrapped


class ModuleIndex:
    """The modules of a model by path, from one walk that does not enter wrappers.

    The index stays correct as long as modules are replaced by `replace` only.

    Args:
        model: the model, with or without adapters.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules: dict[str, nn.Module] = dict(original_modules(model))
        """{path: module} below the model, a wrapper in place of its base layer; a module may have several paths."""

    def at(self, path: str) -> nn.Module:
        """Return the module at a path; "" is the model itself."""
        return self.modules[path] if path else self.model

    def parent(self, path: str) -> nn.Module:
        """Return the module that contains the module at a path, without its wrapper."""
        return unwrapped(self.at(path.rpartition(".")[0]))

    @cached_property
    def paths(self) -> dict[int, list[str]]:
        """{id of a module: all its paths}."""
        paths: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            paths.setdefault(id(module), []).append(path)
        return paths

    def freeze(self) -> None:
        """Set `requires_grad` to False for every parameter outside of wrappers."""
        for module in (self.model, *self.modules.values()):
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad_(False)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in the place of `old` at all its paths; does nothing if the model does not contain `old`."""
        for path in self.paths.pop(id(old), []):
            self.parent(path)._modules[path.rpartition(".")[2]] = new
            self._note(path, new)
            if unwrapped(new) is new:  # a wrapper was removed: add the modules inside of its base layer
                for below, module in original_modules(new, f"{path}."):
                    self._note(below, module)

    def _note(self, path: str, module: nn.Module) -> None:
        self.modules[path] = module
        paths = self.paths.setdefault(id(module), [])
        if path not in paths:
            paths.append(path)
