"""PiSSA: s·BA starts as the best rank-r approximation of W, which is subtracted from the base. arXiv:2404.02948."""

import re
from typing import TYPE_CHECKING

from torch import Tensor

from peftcore.methods.lora.initialisation import Factors, WeightInitialisation, principal_factors
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


@register_variant
class PissaStart(WeightInitialisation):
    """Initialisation `init_lora_weights="pissa"`: the best rank-r approximation of W, subtracted from the base.

    "pissa_niter_N" takes a randomised decomposition with N power iterations.
    """

    names = ("pissa", "pissa_niter_N")

    def is_chosen(self, config: "LoraConfig") -> bool:
        return re.fullmatch(r"pissa(_niter_\d+)?", str(config.init_lora_weights)) is not None

    def factors(self, lora: "Lora", weight: Tensor) -> Factors:
        _, _, iterations = str(lora.config.init_lora_weights).partition("_niter_")
        return principal_factors(weight, lora.r, lora.scaling, int(iterations) if iterations else None)
