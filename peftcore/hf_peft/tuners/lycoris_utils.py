"""`peft.tuners.lycoris_utils`: the class of the layers with an adapter of LoHa or LoKr."""

from peftcore.hf_peft.classes import layer_class

__all__ = ["LycorisLayer"]

LycorisLayer = layer_class("LycorisLayer", "LOHA", derived=("LOKR",))
