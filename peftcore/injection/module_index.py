"""Where the modules of a model stand: the one walk that an operation makes, however many adapters are loaded."""

from functools import cached_property

from torch import nn

from peftcore.layers.wrapper import original_modules, unwrapped


class ModuleIndex:
    """The modules of a model by path, from one walk that goes into no wrapper; right while only `replace` changes it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules: dict[str, nn.Module] = dict(original_modules(model))
        """Every module but the model itself, at each path where it stands; a wrapper for what it stands for."""

    def at(self, path: str) -> nn.Module:
        """The module at a path; "" is the model itself."""
        return self.modules[path] if path else self.model

    def parent(self, path: str) -> nn.Module:
        """What holds the module at a path."""
        return unwrapped(self.at(path.rpartition(".")[0]))

    @cached_property
    def paths(self) -> dict[int, list[str]]:
        """{id of a module: every path where it stands}."""
        paths: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            paths.setdefault(id(module), []).append(path)
        return paths

    def freeze(self) -> None:
        """No parameter outside of wrappers gets a gradient."""
        for module in (self.model, *self.modules.values()):
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad_(False)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever `old` stands; nothing happens where that is nowhere."""
        for path in self.paths.pop(id(old), []):
            self.parent(path)._modules[path.rpartition(".")[2]] = new
            self._note(path, new)
            if unwrapped(new) is new:  # a wrapper has gone: what it stood for shows again, with all that is in it
                for below, module in original_modules(new, f"{path}."):
                    self._note(below, module)

    def _note(self, path: str, module: nn.Module) -> None:
        self.modules[path] = module
        known = self.paths.setdefault(id(module), [])
        if path not in known:
            known.append(path)
