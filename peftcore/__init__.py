"""Parameter-efficient fine-tuning under the names that HF PEFT's users know.

Each name is imported at its first use, so `import peftcore` costs no import of torch. Configuration classes of
third-party methods are names of this module as well.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftcore.config import PeftConfig, TaskType
    from peftcore.conversion import convert_directory_to_lora, convert_to_lora, save_as_lora
    from peftcore.errors import (
        AdapterNameError,
        AdapterStoreError,
        CheckpointError,
        ConfigError,
        ExportError,
        MergeError,
        MissingExtraError,
        PeftError,
        RoutingError,
        TargetError,
        TrainingError,
    )
    from peftcore.export import (
        check_vllm,
        export_gguf_lora,
        export_gguf_merged,
        export_vllm,
        merge_streaming,
    )
    from peftcore.hf_peft.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from peftcore.init import initialize_from_data, replace_lora_weights_loftq
    from peftcore.injection.activation import refresh_adapters
    from peftcore.injection.inject import inject_adapter_in_model
    from peftcore.injection.merge import check_mergeable
    from peftcore.layers.adapter_layer import AdapterLayer
    from peftcore.methods.adalora import AdaLoraConfig
    from peftcore.methods.boft import BOFTConfig
    from peftcore.methods.c3a import C3AConfig
    from peftcore.methods.delora import DeloraConfig
    from peftcore.methods.fourierft import FourierFTConfig
    from peftcore.methods.gralora import GraloraConfig
    from peftcore.methods.hira import HiraConfig
    from peftcore.methods.hra import HRAConfig
    from peftcore.methods.ia3 import IA3Config
    from peftcore.methods.ln_tuning import LNTuningConfig
    from peftcore.methods.loha import LoHaConfig
    from peftcore.methods.lokr import LoKrConfig
    from peftcore.methods.lora import LoraConfig
    from peftcore.methods.miss import MissConfig
    from peftcore.methods.oft import OFTConfig
    from peftcore.methods.poly import PolyConfig
    from peftcore.methods.randlora import RandLoraConfig
    from peftcore.methods.road import RoadConfig
    from peftcore.methods.shira import ShiraConfig
    from peftcore.methods.trainable_tokens import TrainableTokensConfig
    from peftcore.methods.vblora import VBLoRAConfig
    from peftcore.methods.vera import VeraConfig
    from peftcore.methods.waveft import WaveFTConfig
    from peftcore.methods.xlora import XLoraConfig
    from peftcore.model import PeftModel, get_peft_model, prepare_model_for_kbit_training
    from peftcore.prompts.adaption_prompt import AdaptionPromptConfig
    from peftcore.prompts.cpt import CPTConfig
    from peftcore.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig
    from peftcore.prompts.p_tuning import PromptEncoderConfig
    from peftcore.prompts.prefix_tuning import PrefixTuningConfig
    from peftcore.prompts.prompt_tuning import PromptTuningConfig
    from peftcore.registry import tuner_names
    from peftcore.routing import AdapterStore
    from peftcore.storage.reading import load_peft_weights

__version__ = "0.2.0"

_MODULES = {
    "AdapterLayer": "peftcore.layers.adapter_layer",
    "AdaLoraConfig": "peftcore.methods.adalora",
    "AdapterNameError": "peftcore.errors",
    "AdapterStore": "peftcore.routing",
    "AdapterStoreError": "peftcore.errors",
    "AdaptionPromptConfig": "peftcore.prompts.adaption_prompt",
    "AutoPeftModel": "peftcore.hf_peft.auto",
    "AutoPeftModelForCausalLM": "peftcore.hf_peft.auto",
    "AutoPeftModelForFeatureExtraction": "peftcore.hf_peft.auto",
    "AutoPeftModelForQuestionAnswering": "peftcore.hf_peft.auto",
    "AutoPeftModelForSeq2SeqLM": "peftcore.hf_peft.auto",
    "AutoPeftModelForSequenceClassification": "peftcore.hf_peft.auto",
    "AutoPeftModelForTokenClassification": "peftcore.hf_peft.auto",
    "BOFTConfig": "peftcore.methods.boft",
    "C3AConfig": "peftcore.methods.c3a",
    "CPTConfig": "peftcore.prompts.cpt",
    "CheckpointError": "peftcore.errors",
    "ConfigError": "peftcore.errors",
    "DeloraConfig": "peftcore.methods.delora",
    "ExportError": "peftcore.errors",
    "FourierFTConfig": "peftcore.methods.fourierft",
    "GraloraConfig": "peftcore.methods.gralora",
    "HRAConfig": "peftcore.methods.hra",
    "HiraConfig": "peftcore.methods.hira",
    "IA3Config": "peftcore.methods.ia3",
    "LNTuningConfig": "peftcore.methods.ln_tuning",
    "LoHaConfig": "peftcore.methods.loha",
    "LoKrConfig": "peftcore.methods.lokr",
    "LoraConfig": "peftcore.methods.lora",
    "MergeError": "peftcore.errors",
    "MissConfig": "peftcore.methods.miss",
    "MissingExtraError": "peftcore.errors",
    "MultitaskPromptTuningConfig": "peftcore.prompts.multitask_prompt_tuning",
    "OFTConfig": "peftcore.methods.oft",
    "PeftConfig": "peftcore.config",
    "PeftError": "peftcore.errors",
    "PeftModel": "peftcore.model",
    "PolyConfig": "peftcore.methods.poly",
    "PrefixTuningConfig": "peftcore.prompts.prefix_tuning",
    "PromptEncoderConfig": "peftcore.prompts.p_tuning",
    "PromptTuningConfig": "peftcore.prompts.prompt_tuning",
    "RandLoraConfig": "peftcore.methods.randlora",
    "RoadConfig": "peftcore.methods.road",
    "RoutingError": "peftcore.errors",
    "ShiraConfig": "peftcore.methods.shira",
    "TargetError": "peftcore.errors",
    "TaskType": "peftcore.config",
    "TrainableTokensConfig": "peftcore.methods.trainable_tokens",
    "TrainingError": "peftcore.errors",
    "VBLoRAConfig": "peftcore.methods.vblora",
    "VeraConfig": "peftcore.methods.vera",
    "WaveFTConfig": "peftcore.methods.waveft",
    "XLoraConfig": "peftcore.methods.xlora",
    "check_mergeable": "peftcore.injection.merge",
    "check_vllm": "peftcore.export",
    "convert_directory_to_lora": "peftcore.conversion",
    "convert_to_lora": "peftcore.conversion",
    "export_gguf_lora": "peftcore.export",
    "export_gguf_merged": "peftcore.export",
    "export_vllm": "peftcore.export",
    "get_peft_model": "peftcore.model",
    "initialize_from_data": "peftcore.init",
    "inject_adapter_in_model": "peftcore.injection.inject",
    "load_peft_weights": "peftcore.storage.reading",
    "merge_streaming": "peftcore.export",
    "prepare_model_for_kbit_training": "peftcore.model",
    "refresh_adapters": "peftcore.injection.activation",
    "replace_lora_weights_loftq": "peftcore.init",
    "save_as_lora": "peftcore.conversion",
    "tuner_names": "peftcore.registry",
}
"""The module that defines each public name."""

_MOVED = {
    "Architecture": "peftcore.detection",
    "Average": "peftcore.composition",
    "Fusion": "peftcore.routing",
    "Gate": "peftcore.composition",
    "Only": "peftcore.composition",
    "Parallel": "peftcore.composition",
    "Recipe": "peftcore.merging",
    "Split": "peftcore.composition",
    "Stack": "peftcore.composition",
    "Weighted": "peftcore.composition",
    "detect": "peftcore.detection",
}
"""Names that version 0.3 drops here; each remains in the module named."""

__all__ = [
    "AdaLoraConfig",
    "AdapterLayer",
    "AdapterNameError",
    "AdapterStore",
    "AdapterStoreError",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "C3AConfig",
    "CPTConfig",
    "CheckpointError",
    "ConfigError",
    "DeloraConfig",
    "ExportError",
    "FourierFTConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MergeError",
    "MissConfig",
    "MissingExtraError",
    "MultitaskPromptTuningConfig",
    "OFTConfig",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "RandLoraConfig",
    "RoadConfig",
    "RoutingError",
    "ShiraConfig",
    "TargetError",
    "TaskType",
    "TrainableTokensConfig",
    "TrainingError",
    "VBLoRAConfig",
    "VeraConfig",
    "WaveFTConfig",
    "XLoraConfig",
    "check_mergeable",
    "check_vllm",
    "convert_directory_to_lora",
    "convert_to_lora",
    "export_gguf_lora",
    "export_gguf_merged",
    "export_vllm",
    "get_peft_model",
    "initialize_from_data",
    "inject_adapter_in_model",
    "load_peft_weights",
    "merge_streaming",
    "prepare_model_for_kbit_training",
    "refresh_adapters",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "tuner_names",
]


def _third_party_configs() -> dict[str, Any]:
    methods = import_module("peftcore.registry").methods()
    configs = {method.config.__name__: method.config for method in methods.values()}
    return {name: config for name, config in configs.items() if name not in _MODULES}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    elif name in _MOVED:
        warnings.warn(
            f"peftcore.{name} is deprecated; use `from {_MOVED[name]} import {name}`", DeprecationWarning, stacklevel=2
        )
        return getattr(import_module(_MOVED[name]), name)
    elif name.endswith("Config") and name in (configs := _third_party_configs()):
        value = configs[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__, *_third_party_configs()})
