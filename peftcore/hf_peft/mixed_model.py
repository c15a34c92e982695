"""`peft.mixed_model`."""

from typing import Any

from peftcore.hf_peft.classes import PeftMixedModel
from peftcore.hf_peft.reexports import reexported

__all__ = ["PeftMixedModel"]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
