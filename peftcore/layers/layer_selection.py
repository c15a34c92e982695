"""Selection of one wrapper that was switched separately from the model, as by `layer.enable_adapters(False)`.

The wrappers of a model share one `Selection`. A wrapper gets its own `LayerSelection` only if its own `set_adapter` or
`enable_adapters` makes it differ from the model, and loses it again when all layers agree.
"""

from typing import Any

from peftcore.composition.route import Route
from peftcore.layers.active import Selection


class LayerSelection:
    """The active adapters of one wrapper. All other attributes, such as caches and routes, are the model's selection's.

    As for the model, an open route has precedence. Do not switch one layer between a forward pass with activation
    checkpointing and its backward pass, because the layer is computed again with the adapters of that time.

    Args:
        shared: the selection of the model.
    """

    def __init__(self, shared: Selection):
        self.shared = shared
        self.active = shared.active
        self.switched_off = shared.switched_off

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shared":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.shared, name)

    @property
    def now(self) -> Route | tuple[str, ...]:
        """The route in effect; without a route, the names of this wrapper's adapters in effect."""
        now = self.shared.now
        return now if isinstance(now, Route) else self._active_now

    @property
    def _active_now(self) -> tuple[str, ...]:
        return () if self.switched_off else self.active

    @property
    def disabled(self) -> bool:
        """True while the wrapper's adapters are disabled."""
        route = self.shared.route
        return self.switched_off if route is None else route.is_final

    @property
    def in_effect(self) -> tuple[str, ...]:
        """Names of the wrapper's adapters in effect, in order; with a mixed route, every adapter that is in it."""
        now = self.shared.now
        return self.shared.in_effect if isinstance(now, Route) else self._active_now
