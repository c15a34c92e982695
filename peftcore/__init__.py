"""Parameter-efficient fine-tuning under the names that HF PEFT's users know.

Each name is imported when it is first used, so that `peftcore.files` and `peftcore.errors` cost no import of torch.
Every registered method's configuration class is here too, those of third-party packages included.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftcore.config import PeftConfig, TaskType
    from peftcore.conversion import convert_to_lora, save_as_lora
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
    from peftcore.init import initialize_from_data, replace_lora_weights_loftq
    from peftcore.inject import inject_adapter_in_model
    from peftcore.methods.adalora import AdaLoraConfig
    from peftcore.methods.lora import LoraConfig
    from peftcore.model import PeftModel, get_peft_model, prepare_model_for_kbit_training

_HOMES = {
    "AdapterNameError": "peftcore.errors",
    "Architecture": "peftcore.detection",
    "CheckpointError": "peftcore.errors",
    "ConfigError": "peftcore.errors",
    "MergeError": "peftcore.errors",
    "PeftConfig": "peftcore.config",
    "PeftError": "peftcore.errors",
    "PeftModel": "peftcore.model",
    "TargetError": "peftcore.errors",
    "TaskType": "peftcore.config",
    "TrainingError": "peftcore.errors",
    "convert_to_lora": "peftcore.conversion",
    "detect": "peftcore.detection",
    "get_peft_model": "peftcore.model",
    "initialize_from_data": "peftcore.init",
    "inject_adapter_in_model": "peftcore.inject",
    "prepare_model_for_kbit_training": "peftcore.model",
    "replace_lora_weights_loftq": "peftcore.init",
    "save_as_lora": "peftcore.conversion",
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
    "convert_to_lora",
    "detect",
    "get_peft_model",
    "initialize_from_data",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "save_as_lora",
]


def _configurations() -> dict[str, Any]:
    methods = import_module("peftcore.registry").methods()
    return {method.config.__name__: method.config for method in methods.values()}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name.endswith("Config") and name in (configurations := _configurations()):
        value = configurations[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_configurations()})
