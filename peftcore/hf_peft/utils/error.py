"""`peft.utils.error`."""

from peftcore.hf_peft.utils import (
    PeftError,
)

__all__ = [
    "PeftError",
]
