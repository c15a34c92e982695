"""How an adapter reads and writes a base layer, whatever its kind and storage.

Weights are seen in one canonical orientation, whatever the layer keeps: (o, i) for linear-like layers, (o, i/groups,
*kernel) for convolutions, (d, v) for embeddings, which are linear maps of one-hot rows.

Shapes: o out_features, i in_features, d embedding dimension, v vocabulary, r rank.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

UNMERGED_STATE = "_unmerged_state"
"""Attribute of a layer that holds its own parameters while merged ones stand in their place."""


class BaseWeight(ABC):
    """A view on one base layer; holds no weight of its own."""

    kind: ClassVar[str]
    """"linear", "conv", "embedding", "norm" or "parameter" (raw): what the layer does with its input."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer
        self._storage = type(layer._parameters.get("weight"))

    def still_fits(self, layer: nn.Module | None) -> bool:
        """Whether this is the view on `layer`, and its weight is stored as it was."""
        return layer is self.layer and type(self.layer._parameters.get("weight")) is self._storage

    # -- geometry ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def in_features(self) -> int:
        """i: size of the input's feature axis (vocabulary size for an embedding)."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """o: size of the output's feature axis."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial kernel size of a convolution; () for every other layer."""
        return ()

    @property
    def count(self) -> int:
        """How many weights are stacked: the experts of a raw expert parameter, 1 for every other layer."""
        return 1

    # -- storage -------------------------------------------------------------------------------------------------

    quantized: ClassVar[bool] = False
    """Whether the layer keeps its weight in 4 or 8 bits."""

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the dense weight that `read` gives."""
        return self.layer.weight.dtype

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias if hasattr(self.layer, "bias") else None

    @property
    def unmerged_bias(self) -> Tensor | None:
        """The bias without what is merged into it."""
        own = self.layer.__dict__.get(self.unmerged_attribute)
        return self.bias if own is None else own.get("bias")

    @abstractmethod
    def read(self) -> Tensor:
        """The dense weight in canonical orientation; may share memory with the layer."""

    @property
    def unmerged_attribute(self) -> str:
        """Attribute of the layer that holds its own parameters while merged ones stand in their place."""
        return UNMERGED_STATE

    def read_unmerged(self) -> Tensor:
        """The dense weight without what is merged into it."""
        own = self.layer.__dict__.get(self.unmerged_attribute)
        if own is None:
            return self.read()
        now = self.state()
        self.restore(own)
        try:
            return self.read()
        finally:
            self.restore(now)

    @abstractmethod
    def write(self, weight: Tensor) -> None:
        """Give the layer a new weight (canonical, any float type); the old parameter object is left intact."""

    def write_bias(self, bias: Tensor) -> None:
        """Give the layer a new bias (o,); the old parameter object is left intact."""
        self.layer.bias = nn.Parameter(bias.to(self.layer.bias), requires_grad=False)

    def state(self) -> dict[str, Any]:
        """References to what `write` replaces: restoring them is exact to the bit and copies nothing."""
        return {name: self.layer._parameters[name] for name in ("weight", "bias") if name in self.layer._parameters}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        for name, parameter in state.items():
            self.layer._parameters[name] = parameter

    def per_output(self, values: Tensor) -> Tensor:
        """Values (o,) in the shape that broadcasts over the feature axis of this layer's output."""
        return values.view(-1, *(1 for _ in self.kernel))

    # -- mathematics ---------------------------------------------------------------------------------------------

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own map with another weight (canonical) and no bias, in x's floating type."""

    @abstractmethod
    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        """A map (o, r) over the feature axis of what `apply` gave."""

    def computes_in(self, x: Tensor) -> torch.dtype | None:
        """The type in which the layer's output for x is x Wᵀ + b, all frozen; None where it is more than that.

        Then `product` gives that output for an x of this type, and `peftcore.low_rank` may take the layer's place.
        """
        return None

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b (n, o) in fresh memory and without gradient, for x (n, i) of the type that `computes_in` gave."""
        raise NotImplementedError(f"{type(self).__name__} has no product")

    def prefers_product(self, x: Tensor) -> bool:
        """Whether `product`, for x (..., i) flattened, is a faster way to the layer's own output."""
        return False

    def weight_to_keep(self) -> Tensor | None:
        """What autograd keeps to form x's gradient: the layer's own weight, or None where `read` makes it again."""
        return self.read()

    @abstractmethod
    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        """y + pointwise(h, weight), in one pass over y where the layer allows it."""
