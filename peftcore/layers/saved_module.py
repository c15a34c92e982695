"""A module with one trainable copy per adapter (`modules_to_save`), the third of the three wrappers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.composition.algebra import Composition
from peftcore.composition.route import Route
from peftcore.errors import RoutingError
from peftcore.layers.active import Selection
from peftcore.layers.switching import SwitchingMethods
from peftcore.layers.wrapper import LayerWrapper, NamedModules


class SavedModule(SwitchingMethods, LayerWrapper):
    """A module and its trainable copies by adapter name; without a copy of an active adapter, the module itself."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.modules_to_save = NamedModules()
        """{adapter: its trainable copy}; HF PEFT's name, so that filters of parameters by name find the copies."""

    @property
    def copies(self) -> NamedModules:
        """{adapter: its trainable copy}."""
        return self.modules_to_save

    def _holders(self) -> Iterable[Any]:
        return [self.copies]

    def is_empty(self) -> bool:
        """Return True if no adapter has a copy."""
        return not len(self.copies)

    # -- HF PEFT's names ------------------------------------------------------------------------------------

    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()

    @property
    def _adapters(self) -> set[str]:
        """Names of the adapters with a copy; HF PEFT's wrappers of whole modules have this attribute."""
        return set(self.copies)

    @property
    def original_module(self) -> nn.Module:
        """The module itself, without adapters."""
        return self.base_layer

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter whose copy is in effect; [] if the module itself is."""
        return [name for name in self.selection.active if name in self.copies][:1]

    @property
    def active_adapter(self) -> list[str]:
        """The active adapter whose copy is in effect; [] if the module itself is."""
        return self.active_adapters

    # -- forward ---------------------------------------------------------------------------------------------

    def current(self, one: Composition | None = None) -> nn.Module:
        """Return the module in effect: the copy of the first adapter that has one, else the original.

        Args:
            one: a composition of adapters; None for the adapters that are in effect in this thread.

        Raises:
            RoutingError: the composition mixes adapters of which several have a copy.
        """
        chain = self.selection.in_effect if one is None else one.chain()
        names = [name for name in (tuple(one.names()) if one and chain is None else chain or ()) if name in self.copies]
        if one is not None and chain is None and len(set(names)) > 1:
            raise RoutingError(
                f"{self.path} was trained in full by {sorted(set(names))}, and whole modules cannot be mixed; compose "
                "adapters of which at most one has modules_to_save"
            )
        return self.copies[names[0]] if names else self.base_layer

    def _stands_for(self) -> nn.Module:
        route = self.selection.route
        return self.current() if route is None or route.uniform is None else self.current(route.uniform)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module in effect; in a mixed batch, each row's own."""
        route = self.selection.route
        if route is None or route.uniform is not None:
            return self._stands_for()(*args, **kwargs)
        copies = {self.current(one) for one in route.compositions}
        return copies.pop()(*args, **kwargs) if len(copies) == 1 else self._row_by_row(route, *args, **kwargs)

    def _row_by_row(self, route: Route, *args: Any, **kwargs: Any) -> Tensor:
        """Call each copy with its own rows, and put the outputs in the order of the batch."""
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise RoutingError(
                f"{self.path} was trained in full and takes more than one tensor, so a batch cannot mix its copies; "
                "give all rows of a batch the same adapter"
            )
        self.check_rows(args[0], route)
        groups = route.groups(args[0])
        outputs = [self.current(one)(args[0].index_select(0, rows)) for one, rows in groups]
        if not all(isinstance(y, Tensor) for y in outputs):
            raise RoutingError(
                f"{self.path} was trained in full and returns more than a tensor, so a batch cannot mix its copies; "
                "give all rows of a batch the same adapter"
            )
        return torch.cat(outputs).index_select(0, torch.cat([rows for _, rows in groups]).argsort())
