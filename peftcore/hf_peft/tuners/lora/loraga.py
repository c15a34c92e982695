"""`peft.tuners.lora.loraga`: LoRA-GA's preparation before get_peft_model."""

from peftcore.hf_peft.preprocess import preprocess_loraga

__all__ = ["preprocess_loraga"]
