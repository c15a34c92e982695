"""`peft.utils.loftq_utils`."""

from peftcore.hf_peft.utils import (
    replace_lora_weights_loftq,
)

__all__ = [
    "replace_lora_weights_loftq",
]
