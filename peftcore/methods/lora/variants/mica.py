"""MiCA: A trains from zero, and B is fixed to the left singular vectors of the smallest singular values of W.

ΔW = s·BA with B (o, r) the last r columns of U in W = U Σ Vᵀ. arXiv:2604.01694.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from peftcore.errors import TargetError
from peftcore.methods.lora.initialisation import WeightInitialisation, draw_defaults
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora


@register_variant
class MicaStart(WeightInitialisation):
    """Initialisation `init_lora_weights="mica"`: B holds the minor left singular vectors of W and never trains."""

    names = ("mica",)
    stands_alone = True
    reads_base = False
    subtracts = False
    frozen = frozenset({"lora_B_weight"})

    def initialise(self, lora: "Lora") -> None:
        if lora.base.kind not in ("linear", "embedding"):
            raise TargetError(
                f"init_lora_weights='mica' fits linear layers and embeddings; exclude the {lora.base.kind} ones"
            )
        weight = lora.base.read_unmerged().float()
        self.check_rank(lora, weight)
        draw_defaults(lora)
        nn.init.zeros_(lora.lora_A_weight)
        lora.lora_B_weight.copy_(torch.linalg.svd(weight, full_matrices=False).U[:, -lora.r :])
