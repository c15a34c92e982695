"""Base class of the views of quantised linear layers that another package computes.

Such a package has a forward of its own, and often no backward for it. So the view computes the product by the layer's
forward, and its gradient by the dequantised weight: y = x Wᵀ + b, ∂x = ∂y W.

Shapes: o out_features, i in_features.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.bases.plain import LinearWeight


class QuantizedLinear(LinearWeight):
    """A linear layer whose weight is frozen and quantised, with a forward that computes x Wᵀ + b.

    A subclass defines `codes`, `read_from`, `write` and `dtype`.
    """

    quantized = True

    @abstractmethod
    def codes(self, state: Mapping[str, Any]) -> Tensor:
        """Return the ordinary tensor of packed codes in a state, by which a changed weight is noticed."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the inputs that the layer's forward multiplies."""
        return self.dtype

    @property
    def activation_dtype(self) -> torch.dtype | None:
        return self.weight_dtype

    @property
    def shared_weight(self) -> Tensor:
        return self.codes(self.state())

    @property
    def device(self) -> torch.device:
        return self.codes(self.state()).device

    def read(self) -> Tensor:
        return self.read_from(self.state())

    def _versioned_weight(self) -> Tensor | None:
        if torch.compiler.is_compiling():
            return None
        codes = self.codes(self.layer.__dict__.get(self.unmerged_attribute) or self.state())
        return None if codes.is_inference() else codes

    def compute_dtype(self, x: Tensor) -> torch.dtype | None:
        device = x.device.type
        autocast = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        trains_bias = self.bias is not None and self.bias.requires_grad
        return dtype if self.multiplies(dtype) and not trains_bias else None

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Return True if the layer's forward accepts inputs of this dtype, and returns that dtype."""
        return dtype == self.weight_dtype

    def product(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b (..., o) in newly allocated memory, with the gradient of x where it is wanted."""
        dtype = self.compute_dtype(x)
        x = x if dtype is None else x.to(dtype)
        return _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.layer(x)

    def prefers_product(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and x.requires_grad and self.compute_dtype(x) is not None

    def weight_for_backward(self) -> None:
        return None


class _Product(torch.autograd.Function):
    """The layer's forward, with a gradient that dequantises the weight again and saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: QuantizedLinear) -> Tensor:
        ctx.base = base
        return base.layer(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.base.read().to(gradient.dtype), None
