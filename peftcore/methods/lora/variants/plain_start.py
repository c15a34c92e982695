"""LoRA's own start: A random and B zero (on an embedding B random and A zero). arXiv:2106.09685."""

from typing import TYPE_CHECKING

from torch import nn

from peftcore.kernels.start_values import normal_
from peftcore.methods.lora.initialisation import Initialisation, draw_defaults, random_and_zero
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora


@register_variant
class KaimingStart(Initialisation):
    """Initialisation `init_lora_weights=True`: uniform by Kaiming's rule, on embeddings standard normal."""

    names = (True,)


@register_variant
class GaussianStart(Initialisation):
    """Initialisation `init_lora_weights="gaussian"`: normal with standard deviation 1/r, on embeddings 1."""

    names = ("gaussian",)

    def initialise(self, lora: "Lora") -> None:
        draw_defaults(lora)
        random, zero = random_and_zero(lora)
        normal_(random, std=1.0 if lora.base.kind == "embedding" else 1 / lora.r)
        nn.init.zeros_(zero)


@register_variant
class NonzeroStart(Initialisation):
    """Initialisation `init_lora_weights=False`: both factors random, for tests."""

    names = (False,)

    def initialise(self, lora: "Lora") -> None:
        draw_defaults(lora)
