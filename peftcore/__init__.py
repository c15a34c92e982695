"""Parameter-efficient fine-tuning under the names that HF PEFT's users know.

Each name is imported when it is first used, so that `peftcore.files` and `peftcore.errors` cost no import of torch.
Every registered method's configuration class is here too, those of third-party packages included.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftcore.composition import Average, Gate, Only, Parallel, Split, Stack, Weighted
    from peftcore.config import PeftConfig, TaskType
    from peftcore.conversion import convert_directory_to_lora, convert_to_lora, save_as_lora
    from peftcore.detection import Architecture, detect
    from peftcore.errors import (
        AdapterNameError,
        AdapterStoreError,
        CheckpointError,
        ConfigError,
        MergeError,
        PeftError,
        RoutingError,
        TargetError,
        TrainingError,
    )
    from peftcore.export import (
        ExportError,
        check_vllm,
        export_gguf_lora,
        export_gguf_merged,
        export_vllm,
        merge_streaming,
    )
    from peftcore.init import initialize_from_data, replace_lora_weights_loftq
    from peftcore.injection.activation import refresh_adapters
    from peftcore.injection.inject import inject_adapter_in_model
    from peftcore.injection.merge import check_mergeable
    from peftcore.layers.adapter_layer import AdapterLayer
    from peftcore.merging import Recipe
    from peftcore.methods.adalora import AdaLoraConfig
    from peftcore.methods.lora import LoraConfig
    from peftcore.model import PeftModel, get_peft_model, prepare_model_for_kbit_training
    from peftcore.registry import tuner_names
    from peftcore.routing import AdapterStore, Fusion

_HOMES = {
    "AdapterLayer": "peftcore.layers.adapter_layer",
    "AdapterNameError": "peftcore.errors",
    "AdapterStore": "peftcore.routing",
    "AdapterStoreError": "peftcore.errors",
    "Architecture": "peftcore.detection",
    "Average": "peftcore.composition",
    "CheckpointError": "peftcore.errors",
    "ConfigError": "peftcore.errors",
    "ExportError": "peftcore.export",
    "Fusion": "peftcore.routing",
    "Gate": "peftcore.composition",
    "MergeError": "peftcore.errors",
    "Only": "peftcore.composition",
    "Parallel": "peftcore.composition",
    "PeftConfig": "peftcore.config",
    "PeftError": "peftcore.errors",
    "PeftModel": "peftcore.model",
    "Recipe": "peftcore.merging",
    "RoutingError": "peftcore.errors",
    "Split": "peftcore.composition",
    "Stack": "peftcore.composition",
    "TargetError": "peftcore.errors",
    "TaskType": "peftcore.config",
    "TrainingError": "peftcore.errors",
    "Weighted": "peftcore.composition",
    "check_mergeable": "peftcore.injection.merge",
    "check_vllm": "peftcore.export",
    "convert_directory_to_lora": "peftcore.conversion",
    "convert_to_lora": "peftcore.conversion",
    "detect": "peftcore.detection",
    "export_gguf_lora": "peftcore.export",
    "export_gguf_merged": "peftcore.export",
    "export_vllm": "peftcore.export",
    "get_peft_model": "peftcore.model",
    "initialize_from_data": "peftcore.init",
    "inject_adapter_in_model": "peftcore.injection.inject",
    "merge_streaming": "peftcore.export",
    "prepare_model_for_kbit_training": "peftcore.model",
    "refresh_adapters": "peftcore.injection.activation",
    "replace_lora_weights_loftq": "peftcore.init",
    "save_as_lora": "peftcore.conversion",
    "tuner_names": "peftcore.registry",
}

__all__ = [
    "AdaLoraConfig",
    "AdapterLayer",
    "AdapterNameError",
    "AdapterStore",
    "AdapterStoreError",
    "Architecture",
    "Average",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "Fusion",
    "Gate",
    "LoraConfig",
    "MergeError",
    "Only",
    "Parallel",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "Recipe",
    "RoutingError",
    "Split",
    "Stack",
    "TargetError",
    "TaskType",
    "TrainingError",
    "Weighted",
    "check_mergeable",
    "check_vllm",
    "convert_directory_to_lora",
    "convert_to_lora",
    "detect",
    "export_gguf_lora",
    "export_gguf_merged",
    "export_vllm",
    "get_peft_model",
    "initialize_from_data",
    "inject_adapter_in_model",
    "merge_streaming",
    "prepare_model_for_kbit_training",
    "refresh_adapters",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "tuner_names",
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
