"""`peft.tuners.lora.torchao`: the class of LoRA's layers on weights of torchao, for `isinstance`."""

from typing import Any

from peftcore.hf_peft.classes import layer_class
from peftcore.hf_peft.reexports import reexported

__all__ = ["TorchaoLoraLinear"]

TorchaoLoraLinear = layer_class(
    "TorchaoLoraLinear", "LORA", lambda base: base.kind == "linear" and base.backend == "torchao"
)


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
