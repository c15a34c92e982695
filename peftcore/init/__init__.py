"""LoRA initialisations that need data, or the original weights of a quantised base; call them after `get_peft_model`.

`data.py` runs the model over batches; `eva.py`, `corda.py` and `lora_ga.py` compute the factors by `observer.py`'s
interface. `loftq.py` initialises an adapter of a quantised base from the original weights.
"""

import warnings
from typing import Any

from peftcore.init.data import DATA_INITIALISATIONS, initialize_from_data
from peftcore.init.loftq import replace_lora_weights_loftq

__all__ = ["DATA_INITIALISATIONS", "initialize_from_data", "replace_lora_weights_loftq"]


def __getattr__(name: str) -> Any:
    if name != "DATA_STARTS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("peftcore.init.DATA_STARTS is now called DATA_INITIALISATIONS", DeprecationWarning, stacklevel=2)
    return DATA_INITIALISATIONS
