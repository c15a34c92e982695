"""LN tuning: each normalisation trains a weight and bias of its own, copied from the base's. arXiv:2312.11420.

Other layers that are named as targets (LLaVA's projector, a head) train a whole weight and bias in the same way. Of
several active adapters at a layer, the last one's weight applies.
Shapes: o out_features; weight of the base layer's shape, (o) for a norm; bias (o) if the base has one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.bases.norm import NormWeight
from peftcore.config import TunerConfig
from peftcore.registry import register


@dataclass
class LNTuningConfig(TunerConfig):
    """Options of LN tuning: only the targets; all norms by default."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("layers_pattern", "layers_to_transform")


@register("LN_TUNING", LNTuningConfig)
class LNTuning(Adapter):
    """LN tuning at one layer."""

    layer_kinds = frozenset({"norm", "linear", "conv", "embedding"})

    def __init__(self, config: LNTuningConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.ln_tuning_weight = nn.Parameter(torch.empty(base.oriented(base.read_unmerged()).shape))
        self.ln_tuning_bias = None if base.bias is None else nn.Parameter(torch.empty(base.out_features))
        # saves one norm; with a bias the norm's own fused sum is exact; an embedding's output has no input to take its
        # type from
        self.weight_space_forward = base.kind != "embedding" and (base.kind != "norm" or self.ln_tuning_bias is None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.ln_tuning_weight.copy_(self.base.oriented(self.base.read_unmerged()))
        if self.ln_tuning_bias is not None and (bias := self.base.unmerged_bias) is not None:
            self.ln_tuning_bias.copy_(bias)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(self.base, NormWeight):
            return self.base.apply(x, self.base.oriented(self.ln_tuning_weight)).to(y.dtype)
        return self.base.apply(x, self.ln_tuning_weight, self.ln_tuning_bias)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return self.base.oriented(self.ln_tuning_weight).to(weight)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if self.ln_tuning_bias is None or bias is None else self.ln_tuning_bias.to(bias)

    def checkpoint_keys(self) -> dict[str, str]:
        return {name: name.replace("ln_tuning_", "ln_tuning_layers.") for name, _ in self.named_parameters()}
