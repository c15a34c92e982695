"""A module with one trainable copy for each adapter (`modules_to_save`)."""

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.composition.algebra import Composition
from peftcore.composition.route import Route
from peftcore.errors import RoutingError
from peftcore.layers.active import Selection
from peftcore.layers.wrapper import LayerWrapper, NamedModules


class SavedModule(LayerWrapper):
    """`modules_to_save`: one whole trainable copy per adapter; the original where no active adapter has one."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.copies = NamedModules()

    def current(self, one: Composition | None = None) -> nn.Module:
        """The module that acts now, or in a composition: the first adapter's copy, or the original."""
        chain = self.selection.acting if one is None else one.chain()
        names = [name for name in (tuple(one.names()) if one and chain is None else chain or ()) if name in self.copies]
        if one is not None and chain is None and len(set(names)) > 1:
            raise RoutingError(
                f"{self.path} was trained whole by {sorted(set(names))}, and whole modules cannot be mixed; compose "
                "adapters of which one at most has modules_to_save"
            )
        return self.copies[names[0]] if names else self.base_layer

    def _stands_for(self) -> nn.Module:
        route = self.selection.route
        return self.current() if route is None or route.uniform is None else self.current(route.uniform)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.selection.route
        if route is None or route.uniform is not None:
            return self._stands_for()(*args, **kwargs)
        copies = {self.current(one) for one in route.compositions}
        return copies.pop()(*args, **kwargs) if len(copies) == 1 else self._by_rows(route, *args, **kwargs)

    def _by_rows(self, route: Route, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise RoutingError(f"{self.path} was trained whole and takes more than one tensor, so rows cannot be told")
        route.check_layer(args[0], self)
        groups = route.groups(args[0])
        outputs = [self.current(one)(args[0].index_select(0, rows)) for one, rows in groups]
        if not all(isinstance(y, Tensor) for y in outputs):
            raise RoutingError(
                f"{self.path} was trained whole and gives more than a tensor, so rows cannot be put back"
            )
        return torch.cat(outputs).index_select(0, torch.cat([rows for _, rows in groups]).argsort())
