"""Adapters of one base weight, by name, and the state of its merges."""

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
    """The adapters, and after each one the bias that trains with it, if any."""
    return [part for adapter in adapters for part in (adapter, adapter.trained_bias) if part is not None]


class AdapterSlot:
    """Where adapters sit: those of one base weight by name, and what of them is merged into it."""

    adapters: NamedModules
    merged: tuple[str, ...]
    selection: Selection
    training: bool
    path: str
    merged_state: dict[str, Any] | None = None
    """The base's merged parameters while `disable_adapter` has its own in their place."""
    replaced_by: tuple[str, ...] = ()
    """Adapters whose start brought the weight that the base stands with now (LoftQ)."""
    has_trained_biases = False
    """Whether the base's bias trains, or has trained, with an adapter of this site."""

    @property
    def base(self) -> BaseWeight:
        """The view on the base weight."""
        raise NotImplementedError

    @property
    def unmerged_state(self) -> dict[str, Any] | None:
        """The base's own parameters while adapters are merged (one more copy of the weight in memory)."""
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
        """Give the base the weight that an adapter brings; `restore_base` gives its own back, to the bit."""
        base = self.base
        if not self.has_replaced_base:
            base.layer.__dict__[ORIGINAL_STATE] = base.state()
            base.write(weight)
        self.replaced_by = (*self.replaced_by, name)

    @property
    def has_replaced_base(self) -> bool:
        """Whether the base stands now with a weight that `replace_base` gave it."""
        return ORIGINAL_STATE in self.base.layer.__dict__

    def restore_base(self, *names: str) -> None:
        """Undo `replace_base` for these adapters; the base has its own weight again when none is left."""
        base = self.base
        before, self.replaced_by = self.replaced_by, tuple(name for name in self.replaced_by if name not in names)
        if before and not self.replaced_by:
            base.restore(base.layer.__dict__.pop(ORIGINAL_STATE))

    def keep_base(self) -> None:
        """Leave the base as it stands now, for good."""
        self.replaced_by = ()
        self.base.layer.__dict__.pop(ORIGINAL_STATE, None)

    def apply_to_set_aside(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do to the parameters that stand aside what `nn.Module._apply` has done to those in their place."""
        base = self.base
        attributes = base.layer.__dict__
        states = [attributes[name] for name in (base.unmerged_attribute, ORIGINAL_STATE) if name in attributes]
        if self.merged_state is not None:
            states.append(self.merged_state)
        if not states:
            return
        in_place = {id(tensor) for tensor in base.layer.parameters()}
        aside = {id(t): t for state in states for t in _parameters(state) if id(t) not in in_place}
        holder = nn.Module()
        holder._parameters.update({str(key): parameter for key, parameter in aside.items()})
        holder._apply(fn)
        for state in states:
            _exchange(state, {key: holder._parameters[str(key)] for key in aside})
            base.move_state(state)

    def adapter(self, name: str) -> Adapter:
        """The adapter of one name, on the base as it is now."""
        self.follow_base()
        return self.adapters[name]

    def follow_base(self) -> None:
        """Have the adapters on the base as it is now; somebody may have put another layer in its place."""
        _ = self.base

    def move_adapters(self, old: BaseWeight, new: BaseWeight) -> None:
        """Have the adapters on another view; MergeError where some are merged into a layer that is gone."""
        if self.merged and old.layer is not new.layer:
            raise MergeError(
                f"{self.path}: the base layer was replaced while {list(self.merged)} are merged into it; put the old "
                "layer back, call unmerge_adapter, and replace it then"
            )
        if old.layer is not new.layer:
            self.replaced_by = ()
        for name in self.adapters:
            for module in self.adapters[name].modules():
                if isinstance(module, Adapter) and module.base.layer is old.layer:
                    vars(module)["base"] = new
                    module.mark_changed()

    def unmerged(self) -> dict[str, Adapter]:
        """{name: adapter} of those at this site that are not merged."""
        adapters = self._modules["adapters"]._modules  # type: ignore[attr-defined]
        return {name: a for name, a in adapters.items() if name not in self.merged} if self.merged else adapters

    def acting(self) -> list[Adapter]:
        """Adapters of this site that act and are not merged, in order."""
        return self.in_order(self.selection.acting)

    def in_order(self, names: Iterable[str]) -> list[Adapter]:
        """Those of `unmerged` with these names, in this order, each one's trained bias after it."""
        unmerged = self.unmerged()
        adapters = [unmerged[name] for name in names if name in unmerged]
        return with_trained_biases(adapters) if self.has_trained_biases else adapters


def _parameters(state: Mapping[str, Any]) -> Iterator[nn.Parameter]:
    """Parameters among what a base has set aside, also inside of what it keeps together."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _parameters(value)
        elif isinstance(value, nn.Parameter):
            yield value


def _exchange(state: dict[str, Any], new: Mapping[int, Any]) -> None:
    """Put other parameters in the place of those with these ids."""
    for name, value in state.items():
        if isinstance(value, dict):
            _exchange(value, new)
        else:
            state[name] = new.get(id(value), value)
