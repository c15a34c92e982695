"""`peft.utils.peft_types`."""

from peftcore.hf_peft.utils import (
    PeftType,
    TaskType,
)

__all__ = [
    "PeftType",
    "TaskType",
]
