"""`peft.mixed_model`."""

from peftcore.hf_peft.classes import PeftMixedModel

__all__ = ["PeftMixedModel"]
