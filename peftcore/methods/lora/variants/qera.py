"""QERA: s·BA starts as the correction of the quantisation error that the layer's inputs need most. arXiv:2410.06040.

A = Σ⁻¹ Uᵀ E, so that A x has unit variance in every component, and B = U Σ / s; see `quantisation_error`. The paper
writes A = Vᵀ R^(−½), which is the same matrix. Shapes: E (o, i), U (o, r), Σ (r,).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftcore.methods.lora.initialisation import Factors
from peftcore.methods.lora.quantisation_error import QuantisationError, QuantisationErrorStart
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora


class Qera(QuantisationError):
    """Start with whitened A."""

    title = "QERA"
    damping = 1e-6  # only for a root of a singular R

    def split(self, adapter: "Lora", u: Tensor, values: Tensor, projected: Tensor) -> Factors:
        # a direction without error keeps plain LoRA's start, because A = 0 and B = 0 would never train
        a = torch.where(values[:, None] > 0, projected / values[:, None], adapter.lora_A)
        return a, u * values / adapter.scaling


@register_variant
class QeraStart(QuantisationErrorStart):
    """Initialisation `init_lora_weights="qera"`, for a quantised base; needs data and the original weights."""

    names = ("qera",)
    observer = Qera
