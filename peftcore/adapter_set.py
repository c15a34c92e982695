"""What a model knows of its adapters: who is active, their configurations, and where they sit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.adapter import Adapter, Shared
from peftcore.config import TunerConfig
from peftcore.errors import AdapterNameError
from peftcore.host import AdaptedLayer, SavedModule, Selection

ATTRIBUTE = "_adapter_set"
"""Where a model keeps its `AdapterSet`."""


class AdapterSet:
    """The adapters of one model."""

    def __init__(self) -> None:
        self.selection = Selection()
        self.configs: dict[str, TunerConfig] = {}
        self.layers: dict[str, AdaptedLayer] = {}
        """Hosts by the path of the layer they stand for."""
        self.saved: dict[str, SavedModule] = {}
        self.own_biases: dict[str, dict[str, Tensor]] = {}
        """{adapter with bias="all" or "lora_only": {path of a bias: its value before}}."""
        self.generating: dict[str, Any] = {}
        """What `generate` was given for the adapters, such as task_ids, while it runs."""

    def adapters(self, name: str) -> dict[str, Adapter]:
        """{path: adapter} of one name."""
        self.require(name)
        return {path: host.adapters[name] for path, host in self.layers.items() if name in host.adapters}

    def copies(self, name: str) -> dict[str, nn.Module]:
        """{path: copy} of the modules that one adapter trains whole."""
        return {path: host.copies[name] for path, host in self.saved.items() if name in host.copies}

    def parameters(self, model: nn.Module, name: str) -> list[nn.Parameter]:
        """Everything that training this adapter trains."""
        modules = [*self.adapters(name).values(), *self.copies(name).values()]
        biases = [model.get_parameter(bias_path(self, path)) for path in self.own_biases.get(name, {})]
        return list(dict.fromkeys(p for module in modules for p in module.parameters())) + biases

    def shared(self, name: str) -> Shared | None:
        """What the layers of one adapter share, if anything."""
        return shared_by(self.adapters(name))

    def require(self, *names: str) -> None:
        """Raise AdapterNameError for a name that is not there."""
        for name in names:
            if name not in self.configs:
                known = ", ".join(self.configs) or "none yet"
                raise AdapterNameError(f"no adapter named {name!r}; loaded: {known}")


def shared_by(adapters: Mapping[str, Adapter]) -> Shared | None:
    """What the adapters of one name share, if anything."""
    return next((adapter.shared for adapter in adapters.values() if adapter.shared is not None), None)


def adapter_set(model: nn.Module) -> AdapterSet:
    """The model's adapters; AdapterNameError when it has none."""
    found = model.__dict__.get(ATTRIBUTE)
    if found is None:
        raise AdapterNameError(f"this {type(model).__name__} has no adapters; call get_peft_model first")
    return found


def bias_path(adapters: AdapterSet, path: str) -> str:
    """Where the bias that was at `path` before injection is now."""
    layer = path.rpartition(".")[0]
    return f"{layer}.base_layer.bias" if layer in adapters.layers else path
