"""`peft.tuners.lora.loraga`: LoRA-GA's preparation before get_peft_model."""

from typing import Any

from peftcore.hf_peft.preprocess import estimate_gradients, preprocess_loraga
from peftcore.hf_peft.reexports import reexported

__all__ = ["estimate_gradients", "preprocess_loraga"]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
