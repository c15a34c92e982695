"""LoRA: `config.py` the options, `adapter.py` the equation, `variant.py` and `initialisation.py` the variants' hooks.

Each variant (DoRA, aLoRA, PiSSA, ...) is one file of `variants/`. `peftcore/methods/README.md` shows how to add one.
"""

from peftcore.methods.lora.adapter import Lora
from peftcore.methods.lora.config import LoraConfig, LoraRuntimeConfig, is_lora
from peftcore.methods.lora.initialisation import Initialisation, WeightInitialisation
from peftcore.methods.lora.variant import Variant, register_variant

__all__ = [
    "Initialisation",
    "Lora",
    "LoraConfig",
    "LoraRuntimeConfig",
    "Variant",
    "WeightInitialisation",
    "is_lora",
    "register_variant",
]
