"""A base layer with its adapters.

With adapters 1..n acting in order, the layer computes f_n, where f_0 is the base layer and
f_k(x) = after_k(x, f_{k-1}(before_k(x))). Merging the adapters one after another into W gives the same function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight, base_weight
from peftcore.composition.evaluation import composed
from peftcore.composition.route import Route
from peftcore.errors import RoutingError
from peftcore.layers.active import Selection
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.fast_path import fused, has_no_hooks, is_traced, stacked
from peftcore.layers.shared_inputs import given
from peftcore.layers.trained_bias import TrainedBias
from peftcore.layers.wrapper import LayerWrapper, NamedModules


class AdapterLayer(LayerWrapper, AdapterSlot):
    """A base layer and its adapters."""

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.adapters = NamedModules()
        self.merged = ()
        self._view: BaseWeight | None = None
        self.sharing: list[AdapterLayer] = []
        """Hosts called later that may read the same input as this one."""

    def is_empty(self) -> bool:
        """Whether no adapter is left here."""
        return not len(self.adapters)

    def sees_tokens(self, x: Tensor) -> bool:
        return super().sees_tokens(x) and self.base.kind != "conv"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.selection.forget()  # memory on the old device
        super()._apply(fn, recurse)
        if recurse:
            self.apply_to_set_aside(fn)
        return self

    def take_view(self, view: BaseWeight) -> None:
        """Have a view on the base that was made already, where there is none yet."""
        self._view = self._view or view

    def __getattr__(self, name: str) -> Any:
        # some models read a layer's bias and never call the layer
        return self._bias_now() if name == "bias" and self.has_trained_biases else super().__getattr__(name)

    def _bias_now(self) -> Tensor | None:
        """The base's bias as the acting adapters have trained it."""
        route, bias = self.selection.route, self.base.bias
        trained = [part for part in self.acting() if isinstance(part, TrainedBias)]
        if trained and route is not None and route.chain is None:
            raise RoutingError(f"{self.path}.bias is read for all rows of a batch at once; route one adapter for all")
        for part in trained:
            bias = part.merged_bias(bias)
        return bias

    @property
    def base(self) -> BaseWeight:
        view = self._view  # kept, because making one takes as long as a small layer
        if view is None or not view.still_fits(self._modules["base_layer"]):
            view = self._new_view(view)
        return view

    def _new_view(self, old: BaseWeight | None) -> BaseWeight:
        """A view on the base as it is now, for the adapters too."""
        view = base_weight(self.base_layer, self.path)
        if old is not None:
            self.move_adapters(old, view)
        self._view = view
        return view

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now = self.selection.now
        if not args and not kwargs and not torch.compiler.is_compiling() and (y := given(self, x, now)) is not None:
            return y
        route = now if isinstance(now, Route) else None
        if route is None or route.chain is not None:
            return self.chain_output(self.acting(), x, *args, **kwargs)
        unmerged = self.unmerged()
        if not any(name in unmerged for name in route.names):
            return self.base_output(x, *args, **kwargs)
        if not args and not kwargs and (y := stacked(self, x, route)) is not None:
            return y
        self.follow_base()
        return composed(self, route, x, *args, **kwargs)

    def chain_output(self, adapters: Sequence[Adapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base with adapters one on top of another gives."""
        within = len(adapters)
        while within and not adapters[within - 1].through_weight:
            within -= 1
        plain = not within and not args and not kwargs and bool(adapters)
        if plain and (y := stacked(self, x)) is not None:
            return y
        self.follow_base()  # before an adapter looks at it
        inputs: list[Tensor] = []
        for adapter in reversed(adapters[within:]):
            inputs.append(x)
            x = adapter.before(x)
        if plain and (y := fused(self, adapters[0], x)) is not None:
            within, _ = 1, inputs.pop()
        else:
            y = self._through_weight(x, adapters[:within]) if within else self.base_output(x, *args, **kwargs)
        for adapter in adapters[within:]:
            y = adapter.after(inputs.pop(), y)
        return y

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer gives."""
        base = self.base
        computes = base.quantized and not is_traced() and has_no_hooks(self.base_layer)
        if computes and not args and not kwargs and base.prefers_product(x):
            y = base.product(x.reshape(-1, x.shape[-1]))
            return y.view(*x.shape[:-1], y.shape[-1])
        return self.base_layer(x, *args, **kwargs)

    def _through_weight(self, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
        base = self.base
        weight, bias = base.read(), base.bias
        own = weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in adapters:
            adapter.check_mergeable()
            weight, bias = adapter.forward_weight(weight), adapter.merged_bias(bias)
        if x.dtype.itemsize > 2 or base.kind == "norm":
            y = base.apply(x, weight)
        else:  # W' rounded to 16 bits would lose changes below their precision, and W' − W does not
            y = base.apply(x, own) + base.apply(x, weight - own)
        return y if bias is None else y + base.per_output(bias).to(y.dtype)
