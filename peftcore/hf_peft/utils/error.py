"""`peft.utils.error`."""

from peftcore.errors import NoMatchingPeftModuleError, PeftError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
