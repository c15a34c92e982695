"""`peft.config`: base classes of configurations."""

from typing import Any

from peftcore.config import PeftConfig, PromptLearningConfig
from peftcore.hf_peft.reexports import reexported

__all__ = ["PeftConfig", "PeftConfigMixin", "PromptLearningConfig"]

PeftConfigMixin = PeftConfig


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
