"""`peft.tuners.lycoris_utils`: classes of the layers, configurations and models of LoHa and LoKr, for `isinstance`."""

from typing import Any

from peftcore.hf_peft.classes import layer_class
from peftcore.hf_peft.reexports import reexported
from peftcore.injection.tuner_models import LoHaModel, LoKrModel
from peftcore.methods.loha import LoHaConfig
from peftcore.methods.lokr import LoKrConfig

__all__ = ["LycorisConfig", "LycorisLayer", "LycorisTuner"]

LycorisLayer = layer_class("LycorisLayer", "LOHA", derived=("LOKR",))
LycorisConfig = LoHaConfig | LoKrConfig
LycorisTuner = LoHaModel | LoKrModel


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
