"""Normalisation layers: LayerNorm, GroupNorm, and what looks like an RMSNorm, whoever wrote it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from peftcore.bases.base import BaseWeight
from peftcore.bases.own_tensors import call_with, own_tensor


def is_norm(layer: nn.Module) -> bool:
    """Whether `layer` scales each of its features by a weight (d,) of its own and keeps no running statistics."""
    weight = own_tensor(layer, "weight")
    named = isinstance(layer, nn.LayerNorm | nn.GroupNorm) or type(layer).__name__.endswith("Norm")
    inside = any(True for child in layer.children() for _ in child.parameters())
    return named and weight is not None and weight.ndim == 1 and not inside and not isinstance(layer, _NormBase)


class NormWeight(BaseWeight):
    """A normalisation with weight (d,) and perhaps bias (d,).

    The layer itself is called with the other weight, so what is its own stays so: Gemma's 1 + w, T5's float32.
    """

    kind = "norm"

    @property
    def in_features(self) -> int:
        return self.layer.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.layer.weight.shape[0]

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.stored(state).detach()

    def write(self, weight: Tensor) -> None:
        self._put("weight", weight.to(self.dtype))

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        own, wide = own_tensor(self.layer, "bias"), torch.promote_types(x.dtype, weight.dtype)
        tensors = {"weight": weight.to(wide)}  # in 16 bits its changes below the type's precision would do nothing
        if own is not None:
            tensors["bias"] = torch.zeros_like(own, dtype=wide) if bias is None else bias.to(wide)
        return call_with(self.layer, tensors, (x.to(wide),)).to(x.dtype)

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        axis = 1 if isinstance(self.layer, nn.GroupNorm) else -1
        return F.linear(h.movedim(axis, -1), weight.to(h.dtype)).movedim(-1, axis)

    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        return y + self.pointwise(h, weight).to(y.dtype)
