"""`peft.utils.peft_types`."""

from typing import Any

from peftcore.hf_peft.reexports import reexported
from peftcore.hf_peft.utils import (
    PeftType,
    TaskType,
)

__all__ = [
    "PeftType",
    "TaskType",
]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
