"""`peft.tuners.mixed`: models with adapters of several methods. Here every model can have such adapters."""

from typing import Any

from peftcore.hf_peft.reexports import reexported
from peftcore.injection.tuner_model import TunerModel as MixedModel
from peftcore.injection.tuner_model import parameter_prefix
from peftcore.registry import PeftType

__all__ = ["COMPATIBLE_TUNER_TYPES", "PREFIXES", "MixedModel"]
__path__: list[str] = []  # `peft.tuners.mixed.model` is this module, too

COMPATIBLE_TUNER_TYPES = (
    PeftType.LORA,
    PeftType.LOHA,
    PeftType.LOKR,
    PeftType.ADALORA,
    PeftType.OFT,
    PeftType.SHIRA,
)
"""Methods that HF PEFT can mix; peftcore mixes all methods that adapt layers."""
PREFIXES = [parameter_prefix(method) for method in ("LORA", "LOKR", "LOHA", "OFT", "SHIRA")]
"""Starts of the names of these methods' parameters."""


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
