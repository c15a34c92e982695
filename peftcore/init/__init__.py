"""Initialisations from data, or from the original weights of a quantised base; call them after `get_peft_model`.

`data.py` runs the model over batches for the observers of LoRA's variants (EVA, CorDA, LoRA-GA). `loftq.py` initialises
an adapter of a quantised base from the original weights.
"""

import warnings
from typing import Any

from peftcore.init.data import initialize_from_data
from peftcore.init.loftq import replace_lora_weights_loftq

__all__ = ["initialize_from_data", "replace_lora_weights_loftq"]


def __getattr__(name: str) -> Any:
    if name != "DATA_STARTS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("peftcore.init.DATA_STARTS: use the configuration's `needs_data`", DeprecationWarning, stacklevel=2)
    return ("eva", "corda", "lora_ga")
