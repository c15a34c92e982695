"""Adapters of one base weight, and the record of which of them are merged into it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.bases.base import ORIGINAL_STATE
from peftcore.errors import MergeError
from peftcore.layers.active import Selection
from peftcore.layers.wrapper import NamedModules


def with_trained_biases(adapters: Iterable[Adapter]) -> list[Adapter]:
    """Return the adapters, each followed by its trained bias, if any."""
    return [part for adapter in adapters for part in (adapter, adapter.trained_bias) if part is not None]


class AdapterSlot:
    """The adapters of one base weight by name, and which of them are merged into the weight."""

    adapters: NamedModules
    merged_names: tuple[str, ...]
    selection: Selection
    training: bool
    path: str
    merged_state: dict[str, Any] | None = None
    """The merged parameters of the base while `disable_adapter` has the unmerged ones in place."""
    replaced_by: tuple[str, ...] = ()
    """Adapters whose initialisation replaced the base weight (LoftQ)."""
    has_trained_biases = False
    """True if the base's bias trains, or has trained, with an adapter of this slot."""

    @property
    def base(self) -> BaseWeight:
        """The view on the base weight."""
        raise NotImplementedError

    @property
    def unmerged_state(self) -> dict[str, Any] | None:
        """The unmerged parameters of the base while adapters are merged: one more copy of the weight in memory."""
        base = self.base
        return base.layer.__dict__.get(base.unmerged_attribute)

    @unmerged_state.setter
    def unmerged_state(self, state: dict[str, Any] | None) -> None:
        base = self.base
        if state is None:
            base.layer.__dict__.pop(base.unmerged_attribute, None)
        else:
            base.layer.__dict__[base.unmerged_attribute] = state

    def replace_base(self, weight: Tensor, name: str) -> None:
        """Replace the base weight by the one that an adapter requires (LoftQ).

        Args:
            weight: the new weight, in canonical orientation.
            name: the adapter; `restore_base` with this name puts the original back, bit for bit.
        """
        base = self.base
        if not self.has_replaced_base:
            base.layer.__dict__[ORIGINAL_STATE] = base.state()
            base.write(weight)
        self.replaced_by = (*self.replaced_by, name)

    @property
    def has_replaced_base(self) -> bool:
        """True while a weight from `replace_base` is in place."""
        return ORIGINAL_STATE in self.base.layer.__dict__

    def restore_base(self, *names: str) -> None:
        """Undo `replace_base` for these adapters; after the last one, the original weight is in place again."""
        base = self.base
        was_replaced = bool(self.replaced_by)
        self.replaced_by = tuple(name for name in self.replaced_by if name not in names)
        if was_replaced and not self.replaced_by:
            base.restore(base.layer.__dict__.pop(ORIGINAL_STATE))

    def keep_base(self) -> None:
        """Keep the current base weight for good, and drop the original."""
        self.replaced_by = ()
        self.base.layer.__dict__.pop(ORIGINAL_STATE, None)

    def apply_to_stored(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` (a move or a cast) to stored parameters that the layer does not use now, as unmerged weights."""
        base = self.base
        attributes = base.layer.__dict__
        states = [attributes[name] for name in (base.unmerged_attribute, ORIGINAL_STATE) if name in attributes]
        if self.merged_state is not None:
            states.append(self.merged_state)
        if not states:
            return
        in_place = {id(tensor) for tensor in base.layer.parameters()}
        stored = {id(t): t for state in states for t in _parameters(state) if id(t) not in in_place}
        holder = nn.Module()
        holder._parameters.update({str(key): parameter for key, parameter in stored.items()})
        holder._apply(fn)
        for state in states:
            _exchange(state, {key: holder._parameters[str(key)] for key in stored})
            base.move_state(state)

    def adapter(self, name: str) -> Adapter:
        """Return the adapter of one name, with its view on the current base layer."""
        self.follow_base()
        return self.adapters[name]

    def place(self, name: str, adapter: Adapter) -> None:
        """Put an adapter into the slot."""
        self.adapters[name] = adapter
        self._show_others(adapter)

    def _show_others(self, adapter: Adapter) -> None:
        if adapter.sees_others:
            vars(adapter)["beside"] = self.adapters  # nn.Module's own assignment would make them its submodules

    def follow_base(self) -> None:
        """Update the adapters' view if the base layer was replaced."""
        _ = self.base

    def move_adapters(self, old: BaseWeight, new: BaseWeight) -> None:
        """Move the adapters to a new view; raise MergeError if adapters are merged into a layer that was replaced."""
        if self.merged_names and old.layer is not new.layer:
            raise MergeError(
                f"{self.path}: the base layer was replaced while {list(self.merged_names)} are merged into it; put the "
                "old layer back, call unmerge_adapter, and replace it then"
            )
        if old.layer is not new.layer:
            self.replaced_by = ()
        for name in self.adapters:
            self._show_others(self.adapters[name])  # the slot may be a replica of another one
            for module in self.adapters[name].modules():
                if isinstance(module, Adapter) and module.base.layer is old.layer:
                    vars(module)["base"] = new
                    module.mark_changed()

    def unmerged(self) -> dict[str, Adapter]:
        """Return {name: adapter} of the adapters that are not merged."""
        adapters: Any = self.adapters._modules
        return (
            {name: a for name, a in adapters.items() if name not in self.merged_names}
            if self.merged_names
            else adapters
        )

    def unmerged_among(self, names: Iterable[str]) -> dict[str, Adapter]:
        """Return {name: adapter} of the unmerged adapters with these names, in this order."""
        unmerged = self.unmerged()
        return {name: unmerged[name] for name in names if name in unmerged}

    def in_effect(self) -> list[Adapter]:
        """Return the unmerged adapters that are in effect now, in order, each followed by its trained bias."""
        return self.in_order(self.selection.in_effect)

    def in_order(self, names: Iterable[str]) -> list[Adapter]:
        """Return the unmerged adapters with these names, in this order, each followed by its trained bias."""
        unmerged = self.unmerged()
        adapters = [unmerged[name] for name in names if name in unmerged]
        return with_trained_biases(adapters) if self.has_trained_biases else adapters


def _parameters(state: Mapping[str, Any]) -> Iterator[nn.Parameter]:
    """Yield the parameters of a stored state, nested ones too."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _parameters(value)
        elif isinstance(value, nn.Parameter):
            yield value


def _exchange(state: dict[str, Any], new: Mapping[int, Any]) -> None:
    """Replace the parameters of a stored state by `new`, {id of the old one: new one}."""
    for name, value in state.items():
        if isinstance(value, dict):
            _exchange(value, new)
        else:
            state[name] = new.get(id(value), value)
