"""OLoRA: B starts as the first r orthonormal columns of W = QR, A as the first r rows of R. arXiv:2406.01775."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftcore.methods.lora.initialisation import Factors, WeightInitialisation
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora


@register_variant
class OloraStart(WeightInitialisation):
    """Initialisation `init_lora_weights="olora"`: factors of the QR decomposition, subtracted from the base."""

    names = ("olora",)

    def factors(self, lora: "Lora", weight: Tensor) -> Factors:
        q, upper = torch.linalg.qr(weight)
        return upper[: lora.r], q[:, : lora.r]
