"""A module with adapters on raw parameters, which no layer of its own holds: experts, `target_parameters`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peftcore.bases.current_parameters import call_with_parameters
from peftcore.bases.parameter import ParameterWeight
from peftcore.composition.evaluation import composed_weight
from peftcore.errors import RoutingError
from peftcore.layers.active import Selection
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.wrapper import LayerWrapper, NamedModules


class AdapterParameters(LayerWrapper):
    """A module some of whose raw parameters are adapted: they stand changed while its forward runs."""

    exposes_children = True

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.sites = NamedModules()

    def is_empty(self) -> bool:
        """Whether no adapter is left here."""
        return not any(len(self.sites[name].adapters) for name in self.sites)

    def site(self, base: ParameterWeight) -> "ParameterSlot":
        """The site of a parameter, made if need be."""
        key = base.name.replace(".", "/")  # a module's own name has no dots
        if key not in self.sites:
            self.sites[key] = ParameterSlot(base, self).train(self.training)
        return self.sites[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if recurse:
            for key in self.sites:
                self.sites[key].apply_to_set_aside(fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites = (self.sites[key] for key in self.sites)
        changed = {site.base.name: site.changed() for site in sites if site.acting()}
        if not changed:
            return self.base_layer(*args, **kwargs)
        return call_with_parameters(self.base_layer, changed, args, kwargs)


class ParameterSlot(nn.Module, AdapterSlot):
    """One raw parameter of a module and its adapters."""

    def __init__(self, base: ParameterWeight, owner: AdapterParameters):
        super().__init__()
        self._base = base
        self._owner = (owner,)  # in a tuple, because it is no part of this module
        self.path = f"{owner.path}.{base.name}"
        self.selection = owner.selection
        self.adapters = NamedModules()
        self.merged = ()

    @property
    def base(self) -> ParameterWeight:
        module = self._owner[0].base_layer
        if not self._base.still_fits(module):
            view = type(self._base)(module, self._base.name)
            self.move_adapters(self._base, view)
            self._base = view
        return self._base

    def changed(self) -> Tensor:
        """The parameter with the acting adapters in it, as the module keeps it."""
        weight, route = self.base.read(), self.selection.route
        if route is None or route.chain is not None:
            for adapter in self.acting():
                weight = adapter.merged_weight(weight)
        elif route.uniform is None:
            raise RoutingError(
                f"{self.path} is one weight for all rows of a batch, and they are to have different adapters there; "
                "route one adapter for the whole batch, or leave it out of target_parameters (of bias='all')"
            )
        else:
            weight = composed_weight(route.uniform, weight, self.unmerged(), self.path)
        return self.base.oriented(weight)
