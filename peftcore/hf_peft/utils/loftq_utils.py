"""`peft.utils.loftq_utils`."""

from typing import Any

from peftcore.hf_peft.reexports import reexported
from peftcore.hf_peft.utils import (
    replace_lora_weights_loftq,
)

__all__ = [
    "replace_lora_weights_loftq",
]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
