"""`peft.tuners.lycoris_utils`: the class of the layers with an adapter of LoHa or LoKr."""

from typing import Any

from peftcore.hf_peft.classes import layer_class
from peftcore.hf_peft.reexports import reexported

__all__ = ["LycorisLayer"]

LycorisLayer = layer_class("LycorisLayer", "LOHA", derived=("LOKR",))


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
