"""LoRA with a bias c of its own: y = Wx + b + s·(B A x + c). HF PEFT's option `lora_bias`. c (out_features,)."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peftcore.errors import MergeError, PeftWarning
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


@register_variant
class LoraBias(Variant):
    """Variant for `lora_bias=True`: a trained bias c adds s·c to the output; merging adds s·c to the layer's bias."""

    option = "lora_bias"
    layer_kinds = frozenset({"linear", "conv"})
    excludes: ClassVar = {"target_parameters": "a raw parameter has no bias"}
    keys: ClassVar = {"lora_bias": "lora_B.bias"}
    beyond_low_rank = "the adapter trains biases, which LoRA runtimes do not read; merge it into the base instead"

    def link(self, config: "LoraConfig", adapters: "Mapping[str, Lora]") -> None:
        if without := [path for path, lora in adapters.items() if lora.base.bias is None]:
            warnings.warn(
                f"lora_bias: {without[0]} has no bias ({len(without)} layers in all), so the adapter cannot be merged "
                "into its layers; leave lora_bias out if you want to merge it",
                PeftWarning,
                stacklevel=2,
            )

    def add_parameters(self, lora: "Lora") -> None:
        lora.lora_bias = nn.Parameter(torch.zeros(lora.base.out_features))

    def reset_parameters(self, lora: "Lora") -> None:
        if lora.config.init_lora_weights is not False:  # else the start is random, for tests
            nn.init.zeros_(lora.get_parameter("lora_bias"))

    def output(self, lora: "Lora", y: Tensor, x: Tensor, dropped: Tensor, h: Tensor) -> Tensor:
        return y + lora.base.per_output(self.bias_change(lora)).to(y.dtype)

    def merged_bias(self, lora: "Lora", bias: Tensor | None) -> Tensor:
        if bias is None:
            raise MergeError("lora_bias cannot be merged into a layer that has no bias; keep the adapter unmerged")
        return bias + self.bias_change(lora).to(bias)

    def bias_change(self, lora: "Lora") -> Tensor:
        return lora.lora_bias * lora.scaling
