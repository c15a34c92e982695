"""Normalisation layers: LayerNorm, GroupNorm, and any class whose name ends in "Norm", such as RMSNorm."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from peftcore.bases.base import BaseWeight
from peftcore.bases.current_parameters import call_with_parameters
from peftcore.bases.plain import current_parameter


def is_norm(layer: nn.Module) -> bool:
    """Return True if `layer` scales each feature by its own weight (d,) and keeps no running statistics."""
    weight = current_parameter(layer, "weight")
    named = isinstance(layer, nn.LayerNorm | nn.GroupNorm) or type(layer).__name__.endswith("Norm")
    inside = any(True for child in layer.children() for _ in child.parameters())
    return named and weight is not None and weight.ndim == 1 and not inside and not isinstance(layer, _NormBase)


class NormWeight(BaseWeight):
    """A normalisation layer with weight (d,) and an optional bias (d,).

    `apply` calls the layer itself with the other weight, so details of the layer's forward are kept: Gemma scales by
    1 + w, T5 computes in float32.
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
        self._replace("weight", weight.to(self.dtype))

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        base_bias, wide = current_parameter(self.layer, "bias"), torch.promote_types(x.dtype, weight.dtype)
        tensors = {"weight": weight.to(wide)}  # rounding to 16 bits would lose small changes of the weight
        if base_bias is not None:
            tensors["bias"] = (
                torch.zeros_like(base_bias, dtype=wide, device=x.device) if bias is None else bias.to(wide)
            )
        return call_with_parameters(self.layer, tensors, (x.to(wide),)).to(x.dtype)

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        axis = 1 if isinstance(self.layer, nn.GroupNorm) else -1
        return F.linear(h.movedim(axis, -1), weight.to(h.dtype)).movedim(-1, axis)

    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        return y + self.pointwise(h, weight).to(y.dtype)
