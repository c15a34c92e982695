"""What a model knows of its adapters: who is active, their configurations, and where they sit."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftcore._util.per_thread import PerThread
from peftcore.adapter import Adapter, Shared
from peftcore.config import PeftConfig
from peftcore.errors import AdapterNameError
from peftcore.injection.replication import Replication
from peftcore.layers.active import Selection
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.saved_module import SavedModule
from peftcore.layers.trained_bias import TrainedBias
from peftcore.layers.wrapper import Prompts
from peftcore.prompts.learner import PromptLearner

ATTRIBUTE = "_adapter_set"
"""Where a model keeps its `AdapterSet`."""
PROMPTS = "peftcore_prompts"
"""The submodule of a model that holds its prompt learners."""


class ReplacedRows(NamedTuple):
    """An embedding's parameter that a directory's rows stand in for."""

    layer: nn.Module
    name: str
    own: nn.Parameter
    """The model's parameter from before."""


class AdapterSet:
    """The adapters of one model."""

    generate_arguments = PerThread({})
    """What `generate` was given for the adapters, such as task_ids, while it runs."""
    call_arguments = PerThread({})
    """The same of the forward that runs now."""

    def __init__(self) -> None:
        self.selection = Selection()
        self.configs: dict[str, PeftConfig] = {}
        self.kinds: dict[str, type[Any]] = {}
        """Adapter or prompt classes by adapter name."""
        self.forward_arguments: dict[str, frozenset[str]] = {}
        """{adapter that is told of each forward: the arguments it takes of it}"""
        self.layers: dict[str, AdapterSlot] = {}
        """Sites by the path of their layer or raw parameter."""
        self.merged: tuple[str, ...] = ()
        """Adapters that are merged into a base weight now, in the order in which they were."""
        self.unmerged_by = 0
        """Contexts, of all threads, that have the base's own weights in place of merged ones now (count)."""
        self.saved: dict[str, SavedModule] = {}
        self.prompts = Prompts()
        """Prompt learners by adapter name."""
        self.replaced_rows: dict[str, ReplacedRows] = {}
        """{path of an embedding's parameter: what stood there before a directory brought rows for it}."""
        self.replication: tuple[str, Replication] | None = None
        """The adapter that made the model deeper, and how to undo it."""

    def adapters(self, name: str) -> dict[str, Adapter]:
        """{path: adapter} of one name; a bias alone is in `biases`."""
        return {path: own for path, own in self._at_sites(name).items() if not isinstance(own, TrainedBias)}

    def biases(self, name: str) -> dict[str, TrainedBias]:
        """{path of a layer, or of a raw bias: the bias that trains with one adapter}."""
        own = {path: a if isinstance(a, TrainedBias) else a.trained_bias for path, a in self._at_sites(name).items()}
        return {path: bias for path, bias in own.items() if bias is not None}

    def _at_sites(self, name: str) -> dict[str, Adapter]:
        self.require(name)
        return {path: site.adapter(name) for path, site in self.layers.items() if name in site.adapters}

    def of_method(self, name: str) -> dict[str, Adapter]:
        """Those of `adapters` that are of the configuration's own method, not its companions."""
        kind = self.kinds[name]
        return {path: adapter for path, adapter in self.adapters(name).items() if isinstance(adapter, kind)}

    def copies(self, name: str) -> dict[str, nn.Module]:
        """{path: copy} of the modules that one adapter trains whole."""
        return {path: wrapper.copies[name] for path, wrapper in self.saved.items() if name in wrapper.copies}

    def prompt(self, name: str) -> PromptLearner | None:
        """The prompt learner of one name, if that is what it is."""
        return self.prompts.get(name)

    def prompts_in_effect(self) -> list[PromptLearner]:
        """Prompt learners that act, in order."""
        return [self.prompts[name] for name in self.selection.in_effect if name in self.prompts]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Everything that training this adapter trains."""
        prompts = [self.prompts[name]] if name in self.prompts else []
        modules = [*self._at_sites(name).values(), *self.copies(name).values(), *prompts]
        return list(dict.fromkeys(p for module in modules for p in module.parameters()))

    def tensors(self) -> list[Tensor]:
        """All that adapters brought or changed, trained or not: theirs, their copies', and bases they have moved."""
        modules: list[nn.Module] = []
        for name in self.configs:
            modules += [*self._at_sites(name).values(), *self.copies(name).values()]
        modules += [self.prompts[name] for name in self.prompts]
        modules += [site.base.layer for site in self.layers.values() if site.has_replaced_base]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def restore_rows(self) -> None:
        """Put the model's own embeddings back, to the bit, where the model is on the device and of the type it was."""
        moved: dict[int, nn.Parameter] = {}
        for layer, name, own in self.replaced_rows.values():
            now = layer._parameters[name]
            assert now is not None
            if (now.device, now.dtype) != (own.device, own.dtype):  # one for all that share it
                own = moved.setdefault(id(own), nn.Parameter(own.to(now), requires_grad=own.requires_grad))
            layer._parameters[name] = own
        self.replaced_rows.clear()
        self.selection.forget()

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


def untouched_names(model: nn.Module) -> list[str]:
    """Names of the base's frozen parameters and buffers, which are what they were before injection."""
    own = {id(tensor) for tensor in adapter_set(model).tensors()}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [name for name, tensor in named if not tensor.requires_grad and id(tensor) not in own]
