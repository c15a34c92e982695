"""Conversion of an adapter of any mergeable method to plain LoRA, the method that every runtime supports.

`convert.py` converts an adapter of a model, `adalora.py` a directory of AdaLoRA without its model. `layer_factors.py`
computes the factors of each layer, `lora.py` the LoRA's configuration and tensors. `adapters_library.py` converts a
directory of the library `adapters` to a directory of bottleneck adapters. `intruders.py` changes a LoRA so that a model
with it forgets less.
"""

import warnings
from typing import Any

from peftcore.conversion.adalora import convert_directory_to_lora
from peftcore.conversion.adapters_library import convert_adapters_directory
from peftcore.conversion.convert import add_as_lora, convert_to_lora, save_as_lora
from peftcore.conversion.intruders import reduce_intruder_dimension
from peftcore.kernels.factors import LowRankReport

__all__ = [
    "LowRankReport",
    "add_as_lora",
    "convert_adapters_directory",
    "convert_directory_to_lora",
    "convert_to_lora",
    "reduce_intruder_dimension",
    "save_as_lora",
]


def __getattr__(name: str) -> Any:
    if name != "Conversion":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("peftcore.conversion.Conversion is now called LowRankReport", DeprecationWarning, stacklevel=2)
    return LowRankReport
