"""A module with one trainable copy per adapter (`modules_to_save`), the third of the three wrappers."""

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.composition.algebra import Composition
from peftcore.composition.route import Route
from peftcore.errors import RoutingError
from peftcore.layers.active import Selection
from peftcore.layers.wrapper import LayerWrapper, NamedModules


class SavedModule(LayerWrapper):
    """A module and its trainable copies by adapter name; without a copy of an active adapter, the module itself."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.copies = NamedModules()

    def current(self, one: Composition | None = None) -> nn.Module:
        """Return the module in effect: the copy of the first adapter that has one, else the original.

        Args:
            one: a composition; None stands for the adapters in effect now.

        Raises:
            RoutingError: the composition mixes adapters of which several have a copy.
        """
        chain = self.selection.in_effect if one is None else one.chain()
        names = [name for name in (tuple(one.names()) if one and chain is None else chain or ()) if name in self.copies]
        if one is not None and chain is None and len(set(names)) > 1:
            raise RoutingError(
                f"{self.path} was trained whole by {sorted(set(names))}, and whole modules cannot be mixed; compose "
                "adapters of which at most one has modules_to_save"
            )
        return self.copies[names[0]] if names else self.base_layer

    # -- the attributes of HF PEFT's ModulesToSaveWrapper -------------------------------------------------------------

    @property
    def original_module(self) -> nn.Module:
        """The module without a copy."""
        return self.base_layer

    @property
    def modules_to_save(self) -> NamedModules:
        """{adapter: copy}; a copy is also an attribute, `modules_to_save.default`."""
        return self.copies

    @property
    def active_adapters(self) -> list[str]:
        """Names of the model's active adapters that have a copy of this module."""
        return [name for name in self.selection.active if name in self.copies]

    @property
    def active_adapter(self) -> list[str]:
        """Names of the model's active adapters that have a copy of this module."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """True while the model's adapters are disabled."""
        return self.selection.disabled

    @property
    def _adapters(self) -> set[str]:
        return set(self.copies)

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
                f"{self.path} was trained whole and takes more than one tensor, so a batch cannot mix its copies; give "
                "all rows of a batch the same adapter"
            )
        self.check_rows(args[0], route)
        groups = route.groups(args[0])
        outputs = [self.current(one)(args[0].index_select(0, rows)) for one, rows in groups]
        if not all(isinstance(y, Tensor) for y in outputs):
            raise RoutingError(
                f"{self.path} was trained whole and returns more than a tensor, so a batch cannot mix its copies; give "
                "all rows of a batch the same adapter"
            )
        return torch.cat(outputs).index_select(0, torch.cat([rows for _, rows in groups]).argsort())
