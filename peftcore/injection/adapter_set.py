"""The adapters of a model: their configurations, their slots, and which of them are active."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftcore._util.both_libraries import refuse_layers_of_hf_peft
from peftcore._util.per_thread import PerThread
from peftcore.adapter import Adapter, Shared
from peftcore.config import PeftConfig
from peftcore.errors import AdapterNameError, NoAdaptersError
from peftcore.injection.replication import Replication
from peftcore.layers.active import Selection
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.layer_selection import LayerSelection
from peftcore.layers.saved_module import SavedModule
from peftcore.layers.trained_bias import TrainedBias
from peftcore.layers.wrapper import Prompts
from peftcore.prompts.learner import PromptLearner

ATTRIBUTE = "_adapter_set"
"""Attribute of a model that holds its `AdapterSet`."""
PROMPTS = "prompt_encoder"
"""Name of the submodule that holds a model's prompt learners."""


class ReplacedRows(NamedTuple):
    """An embedding's parameter that was replaced by rows from a saved adapter."""

    layer: nn.Module
    name: str
    original: nn.Parameter
    """The model's own parameter."""


class AdapterSet:
    """The adapters of one model."""

    generate_arguments = PerThread({})
    """{name: value} of the adapters' arguments, such as task_ids, in the running `generate`; thread-local."""
    call_arguments = PerThread({})
    """{name: value} of the adapters' arguments in the running forward pass; thread-local."""

    def __init__(self) -> None:
        self.selection = Selection()
        self.selection.owner = self
        self.configs: dict[str, PeftConfig] = {}
        self.restricting: set[str] = set()
        """Adapters beside which some others are refused (`PeftConfig.restricts_others`)."""
        self.kinds: dict[str, type[Any]] = {}
        """Adapter or prompt classes by adapter name."""
        self.forward_arguments: dict[str, frozenset[str]] = {}
        """{adapter whose method prepares each forward pass: names of the arguments that it takes}"""
        self.trainable: set[str] = set()
        """Adapters with parameters that may require gradients."""
        self.layers: dict[str, AdapterSlot] = {}
        """{path of a layer or raw parameter: its slot}"""
        self.merged: tuple[str, ...] = ()
        """Adapters that are merged into the base now, in the order of merging."""
        self.unmerged_by = 0
        """Open `disable_adapter` contexts, of all threads, in which the unmerged weights are in place (count)."""
        self.regularizes_model_loss = True
        """False while the losses that the model returns are without regularisers."""
        self.saved: dict[str, SavedModule] = {}
        """{path: wrapper of a module of `modules_to_save`}"""
        self.prompts = Prompts()
        """{adapter: prompt learner}"""
        self.replaced_rows: dict[str, ReplacedRows] = {}
        """{path of an embedding's parameter: the original that a saved adapter replaced}"""
        self.base_changed_by: str | None = None
        """The last adapter whose initialisation changed base weights for good; it may be deleted since."""
        self.replication: tuple[str, Replication] | None = None
        """(the adapter with `layer_replication`, the state to undo it)"""

    def deepened_by(self, name: str) -> bool:
        """Return True if this adapter added blocks to the model (`layer_replication`)."""
        return self.replication is not None and self.replication[0] == name

    def adapters(self, name: str) -> dict[str, Adapter]:
        """Return {path: adapter} of one name; biases without an adapter are in `biases`."""
        return {path: part for path, part in self._parts(name).items() if not isinstance(part, TrainedBias)}

    def biases(self, name: str) -> dict[str, TrainedBias]:
        """Return {path of a layer, or of a raw bias: the bias that trains with one adapter}."""
        biases = {path: p if isinstance(p, TrainedBias) else p.trained_bias for path, p in self._parts(name).items()}
        return {path: bias for path, bias in biases.items() if bias is not None}

    def _parts(self, name: str) -> dict[str, Adapter]:
        self.require(name)
        return {path: slot.adapter(name) for path, slot in self.layers.items() if name in slot.adapters}

    def of_method(self, name: str) -> dict[str, Adapter]:
        """Return {path: adapter} of the configuration's own method, without trained token rows."""
        kind = self.kinds[name]
        return {path: adapter for path, adapter in self.adapters(name).items() if isinstance(adapter, kind)}

    def copies(self, name: str) -> dict[str, nn.Module]:
        """Return {path: copy} of the modules that one adapter trains in full (`modules_to_save`)."""
        return {path: wrapper.copies[name] for path, wrapper in self.saved.items() if name in wrapper.copies}

    def prompt(self, name: str) -> PromptLearner | None:
        """Return the prompt learner of this name; None if the adapter is not a prompt."""
        return self.prompts.get(name)

    def prompts_in_effect(self) -> list[PromptLearner]:
        """Return the prompt learners of the adapters in effect in this thread, in the order of these adapters."""
        return [self.prompts[name] for name in self.selection.in_effect if name in self.prompts]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return all parameters of one adapter, each once: of its layers, copies, biases and prompt."""
        return list(dict.fromkeys(p for module in self._modules_of(name) for p in module.parameters()))

    def _modules_of(self, name: str) -> list[nn.Module]:
        prompts = [self.prompts[name]] if name in self.prompts else []
        return [*self._parts(name).values(), *self.copies(name).values(), *prompts]

    def set_requires_grad(self, names: Iterable[str], requires_grad: bool) -> None:
        """Set `requires_grad` of all parameters of adapters; other adapters stay as they are.

        Args:
            names: names of loaded adapters.
            requires_grad: False freezes the adapters.
        """
        for name in names:
            for module in self._modules_of(name):
                module.requires_grad_(requires_grad)
            if requires_grad:
                self.trainable.add(name)
            else:
                self.trainable.discard(name)

    def train_active_only(self, trains: bool = True) -> None:
        """Set `requires_grad` as HF PEFT's `set_adapter` does: the active adapters train, all others do not.

        Args:
            trains: False freezes the active adapters, too.
        """
        active = set(self.selection.active)
        self.set_requires_grad(self.trainable - active, False)
        # last, because adapters may share parameters
        self.set_requires_grad((name for name in active if trains or name in self.trainable), trains)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that adapters have added or replaced, trainable or not."""
        modules: list[nn.Module] = []
        for name in self.configs:
            modules += [*self._parts(name).values(), *self.copies(name).values()]
        modules += [self.prompts[name] for name in self.prompts]
        modules += [slot.base.layer for slot in self.layers.values() if slot.has_replaced_base]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def restore_rows(self) -> None:
        """Restore the model's own embeddings: bit for bit, unless the model was moved or cast since."""
        moved: dict[int, nn.Parameter] = {}
        for layer, name, original in self.replaced_rows.values():
            current = layer._parameters[name]
            assert current is not None
            if (current.device, current.dtype) != (original.device, original.dtype):  # tied parameters stay tied
                copied = nn.Parameter(original.to(current), requires_grad=original.requires_grad)
                original = moved.setdefault(id(original), copied)
            layer._parameters[name] = original
        self.replaced_rows.clear()
        self.selection.forget()

    def shared(self, name: str) -> Shared | None:
        """Return the tensors that the layers of one adapter share; None if there are none."""
        return shared_by(self.adapters(name))

    def require(self, *names: str) -> None:
        """Check that adapters are loaded.

        Args:
            names: names of adapters.

        Raises:
            AdapterNameError: a name is not loaded.
        """
        for name in names:
            if name not in self.configs:
                known = ", ".join(self.configs) or "none yet"
                raise AdapterNameError(f"Adapter {name} does not exist; loaded: {known}")

    def activate(self, names: Sequence[str]) -> None:
        """Set the active adapters; `requires_grad` does not change.

        Args:
            names: names of adapters, in order.

        Raises:
            AdapterNameError: a name is not loaded, or given twice; several prompts are named; or several of the
                adapters train the same module in full (`modules_to_save`), or the same row of an embedding.
        """
        self.check_active(names)
        self.selection.active = tuple(names)

    def check_active(self, names: Sequence[str]) -> None:
        """Check that adapters can be active together; see `activate`."""
        if not isinstance(names, Iterable):
            raise AdapterNameError(f"set_adapter takes an adapter's name or a list of names; got {names!r}")
        self.require(*names)
        if len(set(names)) < len(names):
            raise AdapterNameError(f"set_adapter: each adapter at most once; got {list(names)}")
        kinds = {name: self.kinds[name] for name in names}
        prompts = [name for name, kind in kinds.items() if issubclass(kind, PromptLearner) and kind.exclusive]
        if len(prompts) > 1:
            raise AdapterNameError(
                f"set_adapter: {prompts} are prompts, and only one prompt can be active; name one of them"
            )
        for path, wrapper in self.saved.items():
            if len(several := [name for name in names if name in wrapper.copies]) > 1:
                raise AdapterNameError(
                    f"set_adapter: {several} each train {path} in full (modules_to_save), and only one copy can be "
                    "used; name one of them"
                )
        for path, slot in self.layers.items() if len(names) > 1 else ():
            by_row: dict[int, str] = {}
            for name in names:
                rows = slot.adapters[name].replaced_rows() if name in slot.adapters else ()
                if (row := next((row for row in rows if row in by_row), None)) is not None:
                    raise AdapterNameError(
                        f"set_adapter: {[by_row[row], name]} each train row {row} of {path}, and only one can be used; "
                        "name one of them"
                    )
                by_row |= dict.fromkeys(rows, name)

    def deactivate(self, name: str) -> None:
        """Remove a name from the active adapters of the model and of single wrappers."""
        self.selection.apart = [wrapper for wrapper in self.selection.apart if not wrapper.is_empty()]
        for selection in (one.selection for one in self.selection.apart):
            selection.active = tuple(other for other in selection.active if other != name)
        self.selection._active = tuple(other for other in self.selection.active if other != name)
        self.join_wrappers()

    def switch(self, on: bool) -> None:
        """Enable or disable the active adapters of the model and of wrappers that were switched separately."""
        self.selection.switched_off = not on
        for wrapper in self.selection.apart:
            wrapper.selection.switched_off = not on
        self.join_wrappers()

    def switch_wrapper(
        self, wrapper: Any, active: Sequence[str] | None = None, switched_off: bool | None = None
    ) -> None:
        """Change the active adapters of one wrapper.

        If all wrappers have the same state afterwards, the model takes over this state.

        Args:
            wrapper: a wrapper of this model.
            active: names of its active adapters; None to leave them. Names that the model has no adapter of are left
                out, as HF PEFT's layers do: a diffusers pipeline gives every model the names of all its LoRAs, and
                some LoRAs have no part for the text encoder.
            switched_off: True disables them; None leaves them enabled or disabled.

        Raises:
            AdapterNameError: a name is given twice; or see `activate`.
        """
        if active is not None:
            active = [name for name in active if name in self.configs]
            self.check_active(active)
        before = _state(wrapper.selection)
        state = before[0] if active is None else tuple(active), before[1] if switched_off is None else switched_off
        if state == before:
            return
        if wrapper.selection is self.selection:
            wrapper.use_selection(LayerSelection(self.selection))
            self.selection.apart.append(wrapper)
        wrapper.selection.active, wrapper.selection.switched_off = state
        # the last wrapper first: libraries switch all in order, and until the end the last one differs
        wrappers = chain(reversed(self.saved.values()), reversed(self.layers.values()))
        if all(_state(one.selection) == state for one in wrappers):
            self.selection._active, self.selection.switched_off = state
        if state == _state(self.selection):
            self.join_wrappers()

    def join_wrappers(self) -> None:
        """Let wrappers whose active adapters equal the model's use the model's selection again."""
        joining = [wrapper for wrapper in self.selection.apart if _state(wrapper.selection) == _state(self.selection)]
        for wrapper in joining:
            wrapper.use_selection(self.selection)
        self.selection.apart = [wrapper for wrapper in self.selection.apart if wrapper.selection is not self.selection]

    def merge_slots(self, slots: Sequence[AdapterSlot], adapter_names: list[str] | None, safe_merge: bool) -> bool:
        """Merge adapters into the base weights of some slots; see `peftcore.injection.merge.merge_slots`."""
        from peftcore.injection.merge import merge_slots  # here, because that module imports this one

        return merge_slots(self, slots, adapter_names, safe_merge)

    def unmerge_slots(self, slots: Sequence[AdapterSlot]) -> None:
        """Restore the unmerged weights of some slots."""
        from peftcore.injection.merge import unmerge_slots  # here, because that module imports this one

        unmerge_slots(self, slots)


def _state(selection: Any) -> tuple[tuple[str, ...], bool]:
    return selection.active, selection.switched_off


def shared_by(adapters: Mapping[str, Adapter]) -> Shared | None:
    """Return the tensors that these adapters share; None if there are none.

    Args:
        adapters: {path: adapter} of one name.
    """
    return next((adapter.shared for adapter in adapters.values() if adapter.shared is not None), None)


def adapter_set(model: nn.Module) -> AdapterSet:
    """Return the adapters of a model.

    Raises:
        NoAdaptersError: the model has none.
    """
    adapters = model.__dict__.get(ATTRIBUTE)
    if adapters is None:
        refuse_layers_of_hf_peft(model.modules())
        raise NoAdaptersError(f"this {type(model).__name__} has no adapters; call get_peft_model first")
    return adapters


def untouched_names(model: nn.Module) -> list[str]:
    """Return the names of the base's frozen parameters and buffers, which no adapter has added or replaced."""
    of_adapters = {id(tensor) for tensor in adapter_set(model).tensors()}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [name for name, tensor in named if not tensor.requires_grad and id(tensor) not in of_adapters]
