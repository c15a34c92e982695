"""`peft.mapping_func`."""

from peftcore.model import get_peft_model

__all__ = ["get_peft_model"]
