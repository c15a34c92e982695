"""A module with adapters on raw parameters, such as experts (`target_parameters`), the second of the three wrappers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peftcore.bases.current_parameters import call_with_parameters
from peftcore.bases.parameter import ParameterWeight
from peftcore.errors import RoutingError
from peftcore.layers.active import Selection
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.composed import composed_weight
from peftcore.layers.named_tensors import TensorHolder
from peftcore.layers.peft_attributes import PeftLayerAttributes
from peftcore.layers.wrapper import LayerWrapper, NamedModules


class AdapterParameters(PeftLayerAttributes, LayerWrapper):
    """A module and the slots of its adapted parameters.

    While the module's forward runs, each adapted parameter is replaced by its adapted value. Attributes of HF PEFT's
    layers, such as `lora_A`, show the adapters of the first parameter.
    """

    exposes_children = True

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.sites = NamedModules()
        """{name of a parameter, "/" for ".": its slot}; the attribute's name is part of paths in the state dict."""

    @property
    def parameter_name(self) -> str:
        """Name of the first adapted parameter, whose adapters `lora_A` and the other attributes show."""
        return next(iter(self.sites)).replace("/", ".")

    def extra_repr(self) -> str:
        """Return the names of the adapted parameters."""
        names = [name.replace("/", ".") for name in self.sites]
        return f"parameter_name={names[0]!r}" if len(names) == 1 else f"parameter_names={names}"

    @property
    def merged_names(self) -> tuple[str, ...]:
        """Names of the adapters that are merged into the first adapted parameter."""
        return self._slot.merged_names

    def is_empty(self) -> bool:
        """Return True if no slot holds an adapter."""
        return not any(len(self.sites[name].adapters) for name in self.sites)

    @property
    def _slot(self) -> AdapterSlot:
        return self.sites[next(iter(self.sites))]

    def _slots(self) -> list[AdapterSlot]:
        return [self.sites[name] for name in self.sites]

    def slot(self, base: ParameterWeight) -> "ParameterSlot":
        """Return the slot of a parameter; a new one if there is none."""
        key = base.name.replace(".", "/")  # a module's own name has no dots
        if key not in self.sites:
            self.sites[key] = ParameterSlot(base, self).train(self.training)
        return self.sites[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if recurse:
            for key in self.sites:
                self.sites[key].apply_to_stored(fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, computed with the adapted parameters."""
        slots = (self.sites[key] for key in self.sites)
        adapted = {slot.base.name: slot.adapted() for slot in slots if slot.in_effect()}
        if not adapted:
            return self.base_layer(*args, **kwargs)
        return call_with_parameters(self.base_layer, adapted, args, kwargs)


class ParameterSlot(TensorHolder, AdapterSlot):  # type: ignore[misc]
    """One raw parameter of a module and its adapters."""

    def __init__(self, base: ParameterWeight, owner: AdapterParameters):
        super().__init__()
        self._base = base
        self._owner = (owner,)  # in a tuple, so that the owner is no submodule of its slot
        self.path = f"{owner.path}.{base.name}"
        self.selection = owner.selection
        self.add_slot()
        self.merged_names = ()

    @property
    def base(self) -> ParameterWeight:
        """The view on the parameter of the module that is in place now."""
        module = self._owner[0].base_layer
        if not self._base.still_fits(module):
            view = type(self._base)(module, self._base.name)
            self.move_adapters(self._base, view)
            self._base = view
        return self._base

    def adapted(self) -> Tensor:
        """Return the parameter with the active adapters in it, in the module's own orientation."""
        weight, route = self.base.read(), self.selection.route
        if route is None or route.chain is not None:
            for adapter in self.in_effect():
                weight = adapter.merged_weight(weight)
        elif route.uniform is None:
            raise RoutingError(
                f"{self.path} is one weight for all rows of a batch, so rows with different adapters cannot share it; "
                "route one adapter for the whole batch, or leave it out of target_parameters (of bias='all')"
            )
        else:
            weight = composed_weight(route.uniform, weight, self.unmerged(), self.path)
        return self.base.oriented(weight)
