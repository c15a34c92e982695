"""Parameter-efficient fine-tuning under the names that HF PEFT's users know.

Each name is imported when it is first used, so that `peftcore.files` and `peftcore.errors` cost no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftcore.config import PeftConfig, TaskType
    from peftcore.detection import Architecture, detect
    from peftcore.errors import (
        AdapterNameError,
        CheckpointError,
        ConfigError,
        MergeError,
        PeftError,
        TargetError,
        TrainingError,
    )
    from peftcore.inject import inject_adapter_in_model
    from peftcore.methods.adalora import AdaLoraConfig
    from peftcore.methods.lora import LoraConfig
    from peftcore.model import PeftModel, get_peft_model, prepare_model_for_kbit_training

_HOMES = {
    "AdaLoraConfig": "peftcore.methods.adalora",
    "AdapterNameError": "peftcore.errors",
    "Architecture": "peftcore.detection",
    "CheckpointError": "peftcore.errors",
    "ConfigError": "peftcore.errors",
    "LoraConfig": "peftcore.methods.lora",
    "MergeError": "peftcore.errors",
    "PeftConfig": "peftcore.config",
    "PeftError": "peftcore.errors",
    "PeftModel": "peftcore.model",
    "TargetError": "peftcore.errors",
    "TaskType": "peftcore.config",
    "TrainingError": "peftcore.errors",
    "detect": "peftcore.detection",
    "get_peft_model": "peftcore.model",
    "inject_adapter_in_model": "peftcore.inject",
    "prepare_model_for_kbit_training": "peftcore.model",
}

__all__ = [
    "AdaLoraConfig",
    "AdapterNameError",
    "Architecture",
    "CheckpointError",
    "ConfigError",
    "LoraConfig",
    "MergeError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "TargetError",
    "TaskType",
    "TrainingError",
    "detect",
    "get_peft_model",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
