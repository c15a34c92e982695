"""LN tuning: each normalisation trains a weight and bias of its own, copied from the base's. arXiv:2312.11420.

Of several active adapters at a layer, the last one's weight applies. As in HF PEFT, linear layers can be targets, too,
such as LLaVA's projector. Use `modules_to_save` for embeddings.
Shapes: d features; weight (d), bias (d) if the base has one; a linear layer's weight as the layer stores it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.bases.norm import NormWeight
from peftcore.config import TunerConfig
from peftcore.registry import register


@dataclass
class LNTuningConfig(TunerConfig):
    """Options of LN tuning: only the targets, norms or linear layers."""


@register("LN_TUNING", LNTuningConfig)
class LNTuning(Adapter):
    """LN tuning at one layer."""

    layer_kinds = frozenset({"norm", "linear"})

    def __init__(self, config: LNTuningConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        shape = base.oriented(base.read_unmerged()).shape if base.kind == "linear" else (base.out_features,)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = None if base.bias is None else nn.Parameter(torch.empty(base.out_features))
        self.weight_space_forward = self.bias is None  # saves one norm; with a bias the layer's own fused sum is exact

    @torch.no_grad()
    def reset_parameters(self) -> None:
        weight = self.base.read_unmerged()
        self.weight.copy_(self.base.oriented(weight) if self.base.kind == "linear" else weight)
        if self.bias is not None and (bias := self.base.unmerged_bias) is not None:
            self.bias.copy_(bias)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.base, NormWeight):
            return self.base.apply(x, self.weight, self.bias)
        y = self.base.apply(x, self.base.oriented(self.weight))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        own = self.base.oriented(self.weight) if self.base.kind == "linear" else self.weight
        return own.to(weight)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if self.bias is None or bias is None else self.bias.to(bias)

    def checkpoint_keys(self) -> dict[str, str]:
        return {name: f"ln_tuning_layers.{name}" for name, _ in self.named_parameters()}
