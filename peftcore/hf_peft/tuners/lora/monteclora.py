"""`peft.tuners.lora.monteclora`: the module with the trained parameters of MonteCLoRA's noise."""

from typing import Any

from peftcore.hf_peft.reexports import reexported
from peftcore.methods.lora.variants.monteclora import MontecloraSampler

__all__ = ["MontecloraSampler"]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
