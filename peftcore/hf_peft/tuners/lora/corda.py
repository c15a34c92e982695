"""`peft.tuners.lora.corda`: CorDA's preparation before get_peft_model."""

from typing import Any

from peftcore.hf_peft.preprocess import preprocess_corda
from peftcore.hf_peft.reexports import reexported
from peftcore.methods.lora.variants.corda import CordaEigens

__all__ = ["CordaEigens", "preprocess_corda"]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
