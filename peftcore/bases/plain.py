"""Unquantised base layers: Linear, Conv1D, Conv1d/2d/3d and Embedding."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peftcore.bases.base import BaseWeight
from peftcore.bases.onednn import linear


def current_parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return the tensor that a module uses as its parameter `name` in the current forward pass.

    With FSDP version 1 that is a plain attribute; see `peftcore.bases.current_parameters`.

    Returns:
        The tensor; None if the module has no such parameter.
    """
    parameter = module._parameters.get(name)  # several times faster than attribute access
    return module.__dict__.get(name) if parameter is None else parameter


def _is_plain_and_frozen(parameter: Tensor | None) -> bool:
    """Return True if a parameter is absent, or an ordinary tensor in memory that needs no gradient."""
    return parameter is None or (
        type(parameter) in (nn.Parameter, Tensor) and not parameter.requires_grad and not parameter.is_meta
    )


class LinearWeight(BaseWeight):
    """`nn.Linear`: y = x Wᵀ + b, weight (o, i)."""

    kind = "linear"
    layer_class: ClassVar[type[nn.Module]] = nn.Linear
    """The class whose forward is x Wᵀ + b; a subclass may compute something else."""

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.stored(state).detach()

    def write(self, weight: Tensor) -> None:
        self._replace("weight", weight.to(self.dtype))

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h, weight.to(h.dtype))

    def compute_dtype(self, x: Tensor) -> torch.dtype | None:
        if type(self.layer) is not self.layer_class:
            return None
        weight, bias = current_parameter(self.layer, "weight"), current_parameter(self.layer, "bias")
        if not (_is_plain_and_frozen(weight) and _is_plain_and_frozen(bias)):
            return None
        device = x.device.type
        if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return x.dtype if weight is not None and x.dtype == weight.dtype else None

    @property
    def product_takes_any_dtype(self) -> bool:
        return type(self).product is LinearWeight.product  # a subclass with a product of its own says so itself

    def product(self, x: Tensor) -> Tensor:
        bias = current_parameter(self.layer, "bias")
        return linear(x, self._weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def plain_output(self, x: Tensor) -> Tensor | None:
        weight, bias = self.layer._parameters.get("weight"), self.layer._parameters.get("bias")
        if type(self.layer) is not nn.Linear or type(weight) is not nn.Parameter or weight.dtype != x.dtype:
            return super().plain_output(x)
        return None if torch._C._is_any_autocast_enabled() or weight.is_meta else linear(x, weight, bias)

    def weight_for_backward(self) -> Tensor | None:
        return self._weight()

    def _weight(self) -> Tensor:
        """Return the layer's weight (o, i) as autograd tracks it."""
        weight = current_parameter(self.layer, "weight")
        assert weight is not None
        return weight

    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        if y.dtype != h.dtype or torch.is_autocast_enabled(y.device.type):
            return y + self.pointwise(h, weight).to(y.dtype)
        rows = y.numel() // y.shape[-1]  # reshape cannot infer -1 if the rank is 0
        flat = torch.addmm(y.reshape(rows, y.shape[-1]), h.reshape(rows, h.shape[-1]), weight.to(h.dtype).T)
        return flat.view(y.shape)


class Conv1DWeight(LinearWeight):
    """transformers' `Conv1D` (GPT-2): a linear layer that stores its weight as (i, o)."""

    layer_class = Conv1D

    @property
    def in_features(self) -> int:
        return self.layer.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.layer.weight.shape[1]

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.stored(state).detach().T

    def _weight(self) -> Tensor:
        return super()._weight().T

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.T

    def write(self, weight: Tensor) -> None:
        super().write(weight.T)


class ConvWeight(BaseWeight):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: weight (o, i/groups, *kernel)."""

    kind = "conv"

    @property
    def in_features(self) -> int:
        return self.layer.in_channels

    @property
    def out_features(self) -> int:
        return self.layer.out_channels

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.layer.kernel_size)

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.stored(state).detach()

    def write(self, weight: Tensor) -> None:
        self._replace("weight", weight.to(self.dtype))

    def _convolve(self, x: Tensor, weight: Tensor, **geometry: Any) -> Tensor:
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.kernel)]
        return function(x, weight.to(x.dtype), **geometry)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        layer, padding = self.layer, self.layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        groups = self.in_features // weight.shape[1]
        return self._convolve(x, weight, stride=layer.stride, padding=padding, dilation=layer.dilation, groups=groups)

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(h, weight, groups=h.shape[-1 - len(self.kernel)] // weight.shape[1])

    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        return y + self.pointwise(h, weight).to(y.dtype)


class EmbeddingWeight(BaseWeight):
    """`nn.Embedding` and scaled embeddings: y = scale · Wᵀ[x]; canonical weight (d, v), stored as (v, d)."""

    kind = "embedding"

    @property
    def in_features(self) -> int:
        return self.layer.num_embeddings

    @property
    def out_features(self) -> int:
        return self.layer.embedding_dim

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.stored(state).detach().T

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.T

    def write(self, weight: Tensor) -> None:
        self._replace("weight", weight.T.to(self.dtype))

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        rows = F.embedding(x, weight.T, padding_idx=self.layer.padding_idx)
        scale = getattr(self.layer, "embed_scale", None)
        return rows if scale is None else rows * scale

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h, weight.to(h.dtype))

    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        return y + self.pointwise(h, weight).to(y.dtype)
