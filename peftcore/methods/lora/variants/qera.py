"""QERA: s·BA starts as the correction of the quantisation error that the layer's inputs need most. arXiv:2410.06040.

A = c·Σ⁻¹ Uᵀ E and B = U Σ / (s·c); see `quantisation_error`. Every component of A x then has the root mean square c.
The paper has c = 1 and writes A = Vᵀ R^(−½). Here c is the root mean square of A x with the random A of plain LoRA, so
the first optimiser steps change the layer's output as much as with plain LoRA, and its learning rate fits. With c = 1,
which is several times larger, training loses a part of what the start has gained (`benchmarks/LOG.md`). Shapes:
E (o, i), U (o, r), Σ (r,), R (i, i).
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
    """Start with an A whose components have equal mean squares."""

    title = "QERA"
    damping = 1e-6  # only for a root of a singular R

    def split(self, adapter: "Lora", u: Tensor, values: Tensor, projected: Tensor, moment: Tensor) -> Factors:
        drawn = adapter.lora_A_weight.detach().to(projected.dtype)
        c = ((drawn @ moment.to(drawn.dtype)) * drawn).sum(1).mean().sqrt().clamp(min=torch.finfo(drawn.dtype).tiny)
        # a direction without error keeps plain LoRA's start, because A = 0 and B = 0 would never train
        a = torch.where(values[:, None] > 0, c * projected / values[:, None], drawn[: len(values)])
        return a, u * values / (adapter.scaling * c)


@register_variant
class QeraStart(QuantisationErrorStart):
    """Initialisation `init_lora_weights="qera"`, for a quantised base; needs data and the original weights."""

    names = ("qera",)
    observer = Qera
