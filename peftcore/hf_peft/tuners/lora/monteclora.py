"""`peft.tuners.lora.monteclora`: the module with the trained parameters of MonteCLoRA's noise."""

from peftcore.methods.lora.variants.monteclora import MontecloraSampler

__all__ = ["MontecloraSampler"]
