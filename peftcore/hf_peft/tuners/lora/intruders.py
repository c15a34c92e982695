"""`peft.tuners.lora.intruders`."""

from typing import Any

from peftcore.conversion.intruders import reduce_intruder_dimension
from peftcore.hf_peft.reexports import reexported

__all__ = ["reduce_intruder_dimension"]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
