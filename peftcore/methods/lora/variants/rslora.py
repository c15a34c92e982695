"""rsLoRA: s = α/√r in place of α/r, so that the scale of the change does not fall with the rank. arXiv:2312.03732."""

import math

from peftcore.methods.lora.variant import Variant, register_variant


@register_variant
class RsLora(Variant):
    """Variant for `use_rslora=True`: the scaling is α/√r in place of α/r."""

    option = "use_rslora"
    changes_layers = False
    layer_kinds = frozenset({"linear", "conv", "embedding", "parameter"})

    def denominator(self, r: int, denominator: float) -> float:
        return math.sqrt(r)
