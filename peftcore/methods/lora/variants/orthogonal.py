"""Orthogonal start: BA = 0 and neither factor is zero. HF PEFT's `init_lora_weights="orthogonal"`.

A uses the odd rows and B the even rows of one orthogonal (r, r) matrix.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftcore.errors import ConfigError
from peftcore.methods.lora.initialisation import Factors, WeightInitialisation, draw_defaults
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


@register_variant
class OrthogonalStart(WeightInitialisation):
    """Initialisation `init_lora_weights="orthogonal"`: A and B are not zero, and BA is."""

    names = ("orthogonal",)
    subtracts = False

    def check(self, config: "LoraConfig") -> None:
        if any(r % 2 for r in config.ranks()):
            raise ConfigError(f"LoraConfig: init_lora_weights='orthogonal' needs even ranks; got {config.ranks()}")

    def initialise(self, lora: "Lora") -> None:
        self.check_linear(lora)
        draw_defaults(lora)
        lora.set_factors(*orthogonal(lora.r, lora.base.in_features, lora.base.out_features))


def orthogonal(r: int, inputs: int, outputs: int) -> Factors:
    """Return A (r, i) and B (o, r) with BA = 0."""
    q, _ = torch.linalg.qr(torch.randn(r, r, device="cpu"))
    a: Tensor = (torch.randn(inputs, r // 2, device="cpu") @ q[0::2]).T / 10
    return a, (torch.randn(r // 2, outputs, device="cpu").T @ q[1::2]) / 10
