"""Starts of LoRA that look at data, or at weights the model no longer has: each is one call after `get_peft_model`."""

from peftcore.init.data import DATA_STARTS, initialize_from_data
from peftcore.init.loftq import replace_lora_weights_loftq

__all__ = ["DATA_STARTS", "initialize_from_data", "replace_lora_weights_loftq"]
