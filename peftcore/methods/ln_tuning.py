"""LN tuning: each normalisation trains a weight and bias of its own, copied from the base's. arXiv:2312.11420.

Of several active adapters at a layer, the last one's weight applies. PEFT also copies other layers (LLaVA's projector,
embeddings, head) under this name; use `modules_to_save` for those here.
Shapes: d features; weight (d), bias (d) if the base has one.
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
    """Options of LN tuning: only the targets, which are norms."""


@register("LN_TUNING", LNTuningConfig)
class LNTuning(Adapter):
    """LN tuning at one layer."""

    layer_kinds = frozenset({"norm"})

    def __init__(self, config: LNTuningConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.weight = nn.Parameter(torch.empty(base.out_features))
        self.bias = None if base.bias is None else nn.Parameter(torch.empty(base.out_features))
        self.weight_space_forward = self.bias is None  # saves one norm; with a bias the layer's own fused sum is exact

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(self.base.read_unmerged())
        if self.bias is not None and (bias := self.base.unmerged_bias) is not None:
            self.bias.copy_(bias)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(self.base, NormWeight)
        return self.base.apply(x, self.weight, self.bias)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return self.weight.to(weight)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if self.bias is None or bias is None else self.bias.to(bias)

    def checkpoint_keys(self) -> dict[str, str]:
        return {name: f"ln_tuning_layers.{name}" for name, _ in self.named_parameters()}
