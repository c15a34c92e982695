"""`peft.mapping_func`."""

from typing import Any

from peftcore.hf_peft.reexports import reexported
from peftcore.model import get_peft_model

__all__ = ["get_peft_model"]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
