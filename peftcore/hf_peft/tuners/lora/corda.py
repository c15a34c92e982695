"""`peft.tuners.lora.corda`: CorDA's preparation before get_peft_model."""

from peftcore.hf_peft.preprocess import preprocess_corda
from peftcore.methods.lora.variants.corda import CordaEigens

__all__ = ["CordaEigens", "preprocess_corda"]
