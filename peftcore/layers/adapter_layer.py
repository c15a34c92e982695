"""A base layer with its adapters, the first of the three wrappers (see `peftcore.layers.wrapper`).

With the active adapters 1..n in order, the layer computes f_n. f_0 is the base layer, and
f_k(x) = after_k(x, f_{k-1}(before_k(x))). Merging the adapters one after another into W gives the same function.
`peftcore.layers.forward_paths` decides how f_n is computed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight, base_weight
from peftcore.composition.route import Route
from peftcore.errors import RoutingError
from peftcore.layers.active import Selection
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.composed import ascend, descend
from peftcore.layers.decoding import DecodingPlan, decoded
from peftcore.layers.forward_paths import has_no_hooks, is_traced, layer_output
from peftcore.layers.named_tensors import TensorHolder
from peftcore.layers.peft_attributes import PeftLayerAttributes
from peftcore.layers.trained_bias import TrainedBias
from peftcore.layers.wrapper import LayerWrapper


class _Chain(NamedTuple):
    """A cached result of `AdapterLayer.in_order`: the adapters, and the state that the result depends on."""

    names: tuple[str, ...]
    holder: Any
    changes: int
    merged_names: tuple[str, ...]
    with_biases: bool
    adapters: list[Adapter]


class AdapterLayer(PeftLayerAttributes, TensorHolder, LayerWrapper, AdapterSlot):  # type: ignore[misc]
    """A base layer and its adapters by name.

    Args:
        base_layer: the layer that is adapted; stays the submodule `base_layer`.
        selection: the adapters in effect, shared by all wrappers of a model.
    """

    def __init__(self, base_layer: nn.Module, selection: Selection):
        super().__init__(base_layer, selection)
        self.add_slot()
        self.merged_names = ()
        self._view: BaseWeight | None = None
        self.siblings: list[AdapterLayer] = []
        """Adapter layers that are called later and may read the same input as this one."""
        self._chain: _Chain | None = None
        self.decoding_plan: DecodingPlan | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without what is kept of earlier calls: addresses are no part of a copy or a file."""
        return {**super().__getstate__(), "decoding_plan": None, "_chain": None}

    def is_empty(self) -> bool:
        """Return True if the layer holds no adapter."""
        return not len(self.adapters)

    def sees_tokens(self, x: Tensor) -> bool:
        """Return True if x has an axis of tokens besides the axis of rows."""
        return super().sees_tokens(x) and self.base.kind != "conv"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.selection.forget()  # cached tensors are on the old device
        super()._apply(fn, recurse)
        if recurse:
            self.apply_to_stored(fn)
        return self

    def take_view(self, view: BaseWeight) -> None:
        """Use an existing view of the base layer, unless this layer has a view already."""
        if self._view is None:
            view.prepare_layer()
            self._view = view

    def __getattr__(self, name: str) -> Any:
        if name == "bias" and self.has_trained_biases:  # some models read a layer's bias and never call the layer
            return self._trained_bias()
        return super().__getattr__(name)

    @property
    def _slot(self) -> AdapterSlot:
        return self

    def _slots(self) -> list[AdapterSlot]:
        return [self]

    def _trained_bias(self) -> Tensor | None:
        """Return the base layer's bias with the trained biases of the active adapters."""
        route, bias = self.selection.route, self.base.bias
        trained = [part for part in self.in_effect() if isinstance(part, TrainedBias)]
        if trained and route is not None and route.chain is None:
            raise RoutingError(f"{self.path}.bias is read for all rows of a batch at once; route one adapter for all")
        for part in trained:
            bias = part.merged_bias(bias)
        return bias

    @property
    def base(self) -> BaseWeight:
        """The view on the base layer that is in place now."""
        view = self._view  # cached, because making one takes as long as a small layer
        layer: Any = self._modules["base_layer"]
        if view is None or view.layer is not layer or view.storage is not type(layer._parameters.get("weight")):
            view = self._new_view(view)
        return view

    def _new_view(self, old: BaseWeight | None) -> BaseWeight:
        """Make a view on the current base layer, and move the adapters to it."""
        view = base_weight(self.base_layer, self.path)
        view.prepare_layer()
        if old is not None:
            self.move_adapters(old, view)
        self._view = view
        return view

    def chain(self, names: tuple[str, ...]) -> list[Adapter]:
        """Return `in_order(names)`, remembered from the last call."""
        chain = self._chain
        adapters = self.adapters
        if (
            chain is None
            or chain.names != names
            or chain.holder is not adapters  # another one in a DataParallel replica
            or chain.changes != adapters.changes
            or chain.merged_names != self.merged_names
            or chain.with_biases != self.has_trained_biases
        ):
            parts = self.in_order(names)
            chain = _Chain(names, adapters, adapters.changes, self.merged_names, self.has_trained_biases, parts)
            self.__dict__["_chain"] = chain
        return chain.adapters

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base layer with the adapters in effect, of the base layer's shape.

        Args:
            x: the layer's input.
            args: further positional arguments of the base layer.
            kwargs: further keyword arguments of the base layer. As in HF PEFT, `adapter_names` gives each row of x
                its adapter, "__base__" for none; while the adapters are disabled, it has no effect.

        Raises:
            AdapterNameError: one of `adapter_names` is not loaded.
            RoutingError: there are more or fewer `adapter_names` than rows, or adapters are merged.
        """
        if "adapter_names" in kwargs:
            return self._output_by_row(x, args, **kwargs)
        if not (args or kwargs or self.training or torch.is_grad_enabled()):
            y = decoded(self, x)
            if y is not None:
                return y
        return layer_output(self, x, args, kwargs)

    def _output_by_row(self, x: Tensor, args: tuple[Any, ...], adapter_names: Any, **kwargs: Any) -> Tensor:
        if adapter_names is None or self.disable_adapters:
            return self(x, *args, **kwargs)
        route = Route(adapter_names)
        self.selection.owner.require(*route.names)
        if self.merged_names:
            raise RoutingError(f"{list(self.merged_names)} are merged into {self.path}; call unmerge_adapter first")
        route.begin(len(x), None)
        with self.selection.routed(route):
            return layer_output(self, x, args, kwargs)

    # -- the general path: what `layer_output` does if no fast path applies ----------------------------------------

    def chain_output(self, adapters: Sequence[Adapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return f_n(x) for adapters 1..n in order.

        Args:
            adapters: adapters of this layer. All up to the last one with a weight-space forward change the weight.
            x: the layer's input.
            args: further positional arguments of the base layer.
            kwargs: further keyword arguments of the base layer.
        """
        in_weight = len(adapters)
        while in_weight and not adapters[in_weight - 1].weight_space_forward:
            in_weight -= 1
        self.follow_base()
        inputs, z = descend(adapters[in_weight:], x)
        y = self._weight_space_output(z, adapters[:in_weight]) if in_weight else self.base_output(z, *args, **kwargs)
        return ascend(adapters[in_weight:], inputs, y)

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base layer alone; of a quantised base, by its faster product if there is one."""
        base = self.base
        is_product = base.quantized and not is_traced() and has_no_hooks(self.base_layer)
        if is_product and not args and not kwargs and base.prefers_product(x):
            y = base.product(x.reshape(-1, x.shape[-1]))
            return y.view(*x.shape[:-1], y.shape[-1])
        return self.base_layer(x, *args, **kwargs)

    def _weight_space_output(self, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
        """Build the adapted weight W' and bias, and return the layer's output with them."""
        base = self.base
        weight, bias = base.read(), base.bias
        unchanged = weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in adapters:
            adapter.check_mergeable()
            weight, bias = adapter.forward_weight(weight), adapter.merged_bias(bias)
        if x.dtype.itemsize > 2 or base.kind == "norm":
            y = base.apply(x, weight)
        else:  # W' rounded to 16 bits would lose changes below their precision, and W' − W does not
            y = base.apply(x, unchanged) + base.apply(x, weight - unchanged)
        if base.kind == "embedding":  # token ids have no type that the output could have
            y = y.to(base.dtype)
        return y if bias is None else y + base.per_output(bias).to(y.dtype)
