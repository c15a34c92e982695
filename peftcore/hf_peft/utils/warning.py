"""`peft.utils.warning`."""

from peftcore.errors import PeftWarning

__all__ = ["PeftWarning"]
