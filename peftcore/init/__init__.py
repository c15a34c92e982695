"""Initialisations from data, or from weights that the model no longer has: one call after `get_peft_model` each."""

from peftcore.init.data import initialize_from_data
from peftcore.init.loftq import replace_lora_weights_loftq

__all__ = ["initialize_from_data", "replace_lora_weights_loftq"]
