"""`peft.config`: base classes of configurations."""

from peftcore.config import PeftConfig, PromptLearningConfig

__all__ = ["PeftConfig", "PeftConfigMixin", "PromptLearningConfig"]

PeftConfigMixin = PeftConfig
