"""Parameter-efficient fine-tuning under the names that HF PEFT's users know.

Each name is imported at its first use, so `import peftcore` costs no import of torch. Configuration classes of
third-party methods are names of this module as well.
"""

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftcore.hf_peft.alias import SUBMODULES, install_in_peftcore
from peftcore.hf_peft.pickle_by_name import pickle_by_name

if TYPE_CHECKING:
    from peftcore.bases import register_storage
    from peftcore.config import (
        PeftConfig,
        PromptLearningConfig,
        TaskType,
    )
    from peftcore.conversion import (
        add_as_lora,
        convert_adapters_directory,
        convert_directory_to_lora,
        convert_to_lora,
        save_as_lora,
    )
    from peftcore.errors import (
        AdapterNameError,
        AdapterStoreError,
        CheckpointError,
        ConfigError,
        ExportError,
        GgufError,
        HotswapError,
        MergeError,
        MissingExtraError,
        NoMatchingPeftModuleError,
        PeftError,
        PeftWarning,
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
    from peftcore.gguf_files import load_gguf_base, save_gguf_base
    from peftcore.hf_peft.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from peftcore.hf_peft.cartridge import (
        compose_cartridge_adapters,
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
        prompt_embeddings_from_past_key_values,
    )
    from peftcore.hf_peft.classes import (
        CartridgeEncoder,
        CPTEmbedding,
        PeftMixedModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PrefixEncoder,
        PromptEmbedding,
        PromptEncoder,
    )
    from peftcore.hf_peft.data_start import (
        get_eva_state_dict,
        initialize_lora_eva_weights,
        shift_tokens_right,
    )
    from peftcore.hf_peft.kappa import find_kappa_target_modules
    from peftcore.hf_peft.mapping import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        get_peft_config,
    )
    from peftcore.hf_peft.options import (
        EvaConfig,
        LoftQConfig,
        LoraGAConfig,
        MultitaskPromptTuningInit,
        PromptEncoderReparameterizationType,
        PromptTuningInit,
    )
    from peftcore.hf_peft.precision import cast_mixed_precision_params
    from peftcore.hf_peft.preprocess import preprocess_loraga
    from peftcore.hf_peft.tuners.lora.arrow import create_arrow_model
    from peftcore.hf_peft.utils import (
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
        bloom_model_postprocess_past_key_value,
    )
    from peftcore.injection.activation import refresh_adapters
    from peftcore.injection.dequantize import dequantize_base
    from peftcore.injection.inject import inject_adapter_in_model
    from peftcore.injection.loftq import replace_lora_weights_loftq
    from peftcore.injection.merge import check_mergeable
    from peftcore.injection.rounding import calibrate_rounding
    from peftcore.injection.start_from_data import initialize_from_data
    from peftcore.injection.status import (
        get_layer_status,
        get_model_status,
    )
    from peftcore.injection.tuner_models import (
        AdaLoraModel,
        AdamssModel,
        AdaptionPromptModel,
        BeftModel,
        BOFTModel,
        C3AModel,
        DeftModel,
        DeloraModel,
        FourierFTModel,
        FrodModel,
        GloraModel,
        GraloraModel,
        HiraModel,
        HRAModel,
        IA3Model,
        LilyModel,
        LNTuningModel,
        LoHaModel,
        LoKrModel,
        LoraModel,
        MissModel,
        OFTModel,
        OSFModel,
        PeanutModel,
        PolyModel,
        PsoftModel,
        PveraModel,
        RandLoraModel,
        RoadModel,
        ShadowModel,
        ShiraModel,
        SupertuningModel,
        TinyLoraModel,
        TrainableTokensModel,
        UniLoraModel,
        VBLoRAModel,
        VeraModel,
        WaveFTModel,
        XLoraModel,
    )
    from peftcore.kernels.dropout_masks import (
        get_dropout_masks,
        set_dropout_masks,
    )
    from peftcore.kernels.start_subtraction import (
        get_start_subtraction,
        set_start_subtraction,
    )
    from peftcore.layers.adapter_layer import AdapterLayer
    from peftcore.methods.adalora import AdaLoraConfig
    from peftcore.methods.adamss import AdamssConfig
    from peftcore.methods.beft import BeftConfig
    from peftcore.methods.boft import BOFTConfig
    from peftcore.methods.bottleneck import BottleneckConfig
    from peftcore.methods.c3a import C3AConfig
    from peftcore.methods.deft import DeftConfig
    from peftcore.methods.delora import DeloraConfig
    from peftcore.methods.fourierft import FourierFTConfig
    from peftcore.methods.frod import FrodConfig
    from peftcore.methods.glora import GloraConfig
    from peftcore.methods.gralora import GraloraConfig
    from peftcore.methods.hira import HiraConfig
    from peftcore.methods.hra import HRAConfig
    from peftcore.methods.ia3 import IA3Config
    from peftcore.methods.lily import LilyConfig
    from peftcore.methods.ln_tuning import LNTuningConfig
    from peftcore.methods.loha import LoHaConfig
    from peftcore.methods.lokr import LoKrConfig
    from peftcore.methods.lora import (
        LoraConfig,
        LoraRuntimeConfig,
    )
    from peftcore.methods.lora.variants.arrow import ArrowConfig
    from peftcore.methods.lora.variants.bdlora import BdLoraConfig
    from peftcore.methods.lora.variants.kasa import KasaConfig
    from peftcore.methods.lora.variants.monteclora import MontecloraConfig
    from peftcore.methods.lora.variants.velora import VeloraConfig
    from peftcore.methods.miss import MissConfig
    from peftcore.methods.oft import OFTConfig
    from peftcore.methods.osf import OSFConfig
    from peftcore.methods.peanut import PeanutConfig
    from peftcore.methods.poly import PolyConfig
    from peftcore.methods.psoft import PsoftConfig
    from peftcore.methods.pvera import PveraConfig
    from peftcore.methods.randlora import RandLoraConfig
    from peftcore.methods.road import RoadConfig
    from peftcore.methods.shira import ShiraConfig
    from peftcore.methods.supertuning import SupertuningConfig
    from peftcore.methods.tinylora import TinyLoraConfig
    from peftcore.methods.trainable_tokens import TrainableTokensConfig
    from peftcore.methods.unilora import UniLoraConfig
    from peftcore.methods.vblora import VBLoRAConfig
    from peftcore.methods.vera import VeraConfig
    from peftcore.methods.waveft import WaveFTConfig
    from peftcore.methods.xlora import XLoraConfig
    from peftcore.model import (
        PeftModel,
        get_peft_model,
        prepare_model_for_kbit_training,
    )
    from peftcore.prompts.adaption_prompt import AdaptionPromptConfig
    from peftcore.prompts.cartridge import CartridgeConfig
    from peftcore.prompts.cpt import CPTConfig
    from peftcore.prompts.loreft import LoReftConfig
    from peftcore.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig
    from peftcore.prompts.p_tuning import PromptEncoderConfig
    from peftcore.prompts.prefix_tuning import PrefixTuningConfig
    from peftcore.prompts.prompt_tuning import PromptTuningConfig
    from peftcore.prompts.shadow import ShadowConfig
    from peftcore.registry import (
        PeftType,
        tuner_names,
    )
    from peftcore.routing import AdapterStore
    from peftcore.storage.reading import load_peft_weights
    from peftcore.storage.state_dict import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )

__version__ = "0.2.0"

_MODULES = {
    "AdaLoraConfig": "peftcore.methods.adalora",
    "AdaLoraModel": "peftcore.injection.tuner_models",
    "AdamssConfig": "peftcore.methods.adamss",
    "AdamssModel": "peftcore.injection.tuner_models",
    "AdapterLayer": "peftcore.layers.adapter_layer",
    "AdapterNameError": "peftcore.errors",
    "AdapterStore": "peftcore.routing",
    "AdapterStoreError": "peftcore.errors",
    "AdaptionPromptConfig": "peftcore.prompts.adaption_prompt",
    "AdaptionPromptModel": "peftcore.injection.tuner_models",
    "ArrowConfig": "peftcore.methods.lora.variants.arrow",
    "AutoPeftModel": "peftcore.hf_peft.auto",
    "AutoPeftModelForCausalLM": "peftcore.hf_peft.auto",
    "AutoPeftModelForFeatureExtraction": "peftcore.hf_peft.auto",
    "AutoPeftModelForQuestionAnswering": "peftcore.hf_peft.auto",
    "AutoPeftModelForSeq2SeqLM": "peftcore.hf_peft.auto",
    "AutoPeftModelForSequenceClassification": "peftcore.hf_peft.auto",
    "AutoPeftModelForTokenClassification": "peftcore.hf_peft.auto",
    "BOFTConfig": "peftcore.methods.boft",
    "BOFTModel": "peftcore.injection.tuner_models",
    "BdLoraConfig": "peftcore.methods.lora.variants.bdlora",
    "BeftConfig": "peftcore.methods.beft",
    "BeftModel": "peftcore.injection.tuner_models",
    "BottleneckConfig": "peftcore.methods.bottleneck",
    "C3AConfig": "peftcore.methods.c3a",
    "C3AModel": "peftcore.injection.tuner_models",
    "CPTConfig": "peftcore.prompts.cpt",
    "CPTEmbedding": "peftcore.hf_peft.classes",
    "CartridgeConfig": "peftcore.prompts.cartridge",
    "CartridgeEncoder": "peftcore.hf_peft.classes",
    "CheckpointError": "peftcore.errors",
    "ConfigError": "peftcore.errors",
    "DeftConfig": "peftcore.methods.deft",
    "DeftModel": "peftcore.injection.tuner_models",
    "DeloraConfig": "peftcore.methods.delora",
    "DeloraModel": "peftcore.injection.tuner_models",
    "EvaConfig": "peftcore.hf_peft.options",
    "ExportError": "peftcore.errors",
    "FourierFTConfig": "peftcore.methods.fourierft",
    "FourierFTModel": "peftcore.injection.tuner_models",
    "FrodConfig": "peftcore.methods.frod",
    "FrodModel": "peftcore.injection.tuner_models",
    "GgufError": "peftcore.errors",
    "GloraConfig": "peftcore.methods.glora",
    "GloraModel": "peftcore.injection.tuner_models",
    "GraloraConfig": "peftcore.methods.gralora",
    "GraloraModel": "peftcore.injection.tuner_models",
    "HRAConfig": "peftcore.methods.hra",
    "HRAModel": "peftcore.injection.tuner_models",
    "HiraConfig": "peftcore.methods.hira",
    "HiraModel": "peftcore.injection.tuner_models",
    "HotswapError": "peftcore.errors",
    "IA3Config": "peftcore.methods.ia3",
    "IA3Model": "peftcore.injection.tuner_models",
    "KasaConfig": "peftcore.methods.lora.variants.kasa",
    "LNTuningConfig": "peftcore.methods.ln_tuning",
    "LNTuningModel": "peftcore.injection.tuner_models",
    "LilyConfig": "peftcore.methods.lily",
    "LilyModel": "peftcore.injection.tuner_models",
    "LoHaConfig": "peftcore.methods.loha",
    "LoHaModel": "peftcore.injection.tuner_models",
    "LoKrConfig": "peftcore.methods.lokr",
    "LoKrModel": "peftcore.injection.tuner_models",
    "LoReftConfig": "peftcore.prompts.loreft",
    "LoftQConfig": "peftcore.hf_peft.options",
    "LoraConfig": "peftcore.methods.lora",
    "LoraGAConfig": "peftcore.hf_peft.options",
    "LoraModel": "peftcore.injection.tuner_models",
    "LoraRuntimeConfig": "peftcore.methods.lora",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "peftcore.hf_peft.mapping",
    "MergeError": "peftcore.errors",
    "MissConfig": "peftcore.methods.miss",
    "MissModel": "peftcore.injection.tuner_models",
    "MissingExtraError": "peftcore.errors",
    "MontecloraConfig": "peftcore.methods.lora.variants.monteclora",
    "MultitaskPromptTuningConfig": "peftcore.prompts.multitask_prompt_tuning",
    "MultitaskPromptTuningInit": "peftcore.hf_peft.options",
    "NoMatchingPeftModuleError": "peftcore.errors",
    "OFTConfig": "peftcore.methods.oft",
    "OFTModel": "peftcore.injection.tuner_models",
    "OSFConfig": "peftcore.methods.osf",
    "OSFModel": "peftcore.injection.tuner_models",
    "PEFT_TYPE_TO_CONFIG_MAPPING": "peftcore.hf_peft.mapping",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "peftcore.hf_peft.mapping",
    "PEFT_TYPE_TO_TUNER_MAPPING": "peftcore.hf_peft.mapping",
    "PeanutConfig": "peftcore.methods.peanut",
    "PeanutModel": "peftcore.injection.tuner_models",
    "PeftConfig": "peftcore.config",
    "PeftError": "peftcore.errors",
    "PeftMixedModel": "peftcore.hf_peft.classes",
    "PeftModel": "peftcore.model",
    "PeftModelForCausalLM": "peftcore.hf_peft.classes",
    "PeftModelForFeatureExtraction": "peftcore.hf_peft.classes",
    "PeftModelForQuestionAnswering": "peftcore.hf_peft.classes",
    "PeftModelForSeq2SeqLM": "peftcore.hf_peft.classes",
    "PeftModelForSequenceClassification": "peftcore.hf_peft.classes",
    "PeftModelForTokenClassification": "peftcore.hf_peft.classes",
    "PeftType": "peftcore.registry",
    "PeftWarning": "peftcore.errors",
    "PolyConfig": "peftcore.methods.poly",
    "PolyModel": "peftcore.injection.tuner_models",
    "PrefixEncoder": "peftcore.hf_peft.classes",
    "PrefixTuningConfig": "peftcore.prompts.prefix_tuning",
    "PromptEmbedding": "peftcore.hf_peft.classes",
    "PromptEncoder": "peftcore.hf_peft.classes",
    "PromptEncoderConfig": "peftcore.prompts.p_tuning",
    "PromptEncoderReparameterizationType": "peftcore.hf_peft.options",
    "PromptLearningConfig": "peftcore.config",
    "PromptTuningConfig": "peftcore.prompts.prompt_tuning",
    "PromptTuningInit": "peftcore.hf_peft.options",
    "PveraConfig": "peftcore.methods.pvera",
    "PveraModel": "peftcore.injection.tuner_models",
    "PsoftConfig": "peftcore.methods.psoft",
    "PsoftModel": "peftcore.injection.tuner_models",
    "RandLoraConfig": "peftcore.methods.randlora",
    "RandLoraModel": "peftcore.injection.tuner_models",
    "RoadConfig": "peftcore.methods.road",
    "RoadModel": "peftcore.injection.tuner_models",
    "RoutingError": "peftcore.errors",
    "ShadowConfig": "peftcore.prompts.shadow",
    "ShadowModel": "peftcore.injection.tuner_models",
    "ShiraConfig": "peftcore.methods.shira",
    "ShiraModel": "peftcore.injection.tuner_models",
    "SupertuningConfig": "peftcore.methods.supertuning",
    "SupertuningModel": "peftcore.injection.tuner_models",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "peftcore.hf_peft.utils",
    "TargetError": "peftcore.errors",
    "TaskType": "peftcore.config",
    "TinyLoraConfig": "peftcore.methods.tinylora",
    "TinyLoraModel": "peftcore.injection.tuner_models",
    "TrainableTokensConfig": "peftcore.methods.trainable_tokens",
    "TrainableTokensModel": "peftcore.injection.tuner_models",
    "TrainingError": "peftcore.errors",
    "UniLoraConfig": "peftcore.methods.unilora",
    "UniLoraModel": "peftcore.injection.tuner_models",
    "VBLoRAConfig": "peftcore.methods.vblora",
    "VBLoRAModel": "peftcore.injection.tuner_models",
    "VeloraConfig": "peftcore.methods.lora.variants.velora",
    "VeraConfig": "peftcore.methods.vera",
    "VeraModel": "peftcore.injection.tuner_models",
    "WaveFTConfig": "peftcore.methods.waveft",
    "WaveFTModel": "peftcore.injection.tuner_models",
    "XLoraConfig": "peftcore.methods.xlora",
    "XLoraModel": "peftcore.injection.tuner_models",
    "bloom_model_postprocess_past_key_value": "peftcore.hf_peft.utils",
    "calibrate_rounding": "peftcore.injection.rounding",
    "cast_mixed_precision_params": "peftcore.hf_peft.precision",
    "check_mergeable": "peftcore.injection.merge",
    "check_vllm": "peftcore.export",
    "compose_cartridge_adapters": "peftcore.hf_peft.cartridge",
    "convert_adapters_directory": "peftcore.conversion",
    "convert_directory_to_lora": "peftcore.conversion",
    "add_as_lora": "peftcore.conversion",
    "convert_to_lora": "peftcore.conversion",
    "create_arrow_model": "peftcore.hf_peft.tuners.lora.arrow",
    "dequantize_base": "peftcore.injection.dequantize",
    "export_gguf_lora": "peftcore.export",
    "export_gguf_merged": "peftcore.export",
    "export_vllm": "peftcore.export",
    "find_kappa_target_modules": "peftcore.hf_peft.kappa",
    "get_base_model_state_dict": "peftcore.storage.state_dict",
    "get_dropout_masks": "peftcore.kernels.dropout_masks",
    "get_eva_state_dict": "peftcore.hf_peft.data_start",
    "get_layer_status": "peftcore.injection.status",
    "get_model_status": "peftcore.injection.status",
    "get_peft_config": "peftcore.hf_peft.mapping",
    "get_peft_model": "peftcore.model",
    "get_peft_model_state_dict": "peftcore.storage.state_dict",
    "get_start_subtraction": "peftcore.kernels.start_subtraction",
    "initialize_from_data": "peftcore.injection.start_from_data",
    "initialize_kv_prefix_from_past_key_values": "peftcore.hf_peft.cartridge",
    "initialize_kv_prefix_from_text": "peftcore.hf_peft.cartridge",
    "initialize_lora_eva_weights": "peftcore.hf_peft.data_start",
    "inject_adapter_in_model": "peftcore.injection.inject",
    "load_gguf_base": "peftcore.gguf_files",
    "load_peft_weights": "peftcore.storage.reading",
    "merge_streaming": "peftcore.export",
    "prepare_model_for_kbit_training": "peftcore.model",
    "preprocess_loraga": "peftcore.hf_peft.preprocess",
    "prompt_embeddings_from_past_key_values": "peftcore.hf_peft.cartridge",
    "refresh_adapters": "peftcore.injection.activation",
    "register_storage": "peftcore.bases",
    "replace_lora_weights_loftq": "peftcore.injection.loftq",
    "save_as_lora": "peftcore.conversion",
    "save_gguf_base": "peftcore.gguf_files",
    "set_base_model_state_dict": "peftcore.storage.state_dict",
    "set_dropout_masks": "peftcore.kernels.dropout_masks",
    "set_peft_model_state_dict": "peftcore.storage.state_dict",
    "set_start_subtraction": "peftcore.kernels.start_subtraction",
    "shift_tokens_right": "peftcore.hf_peft.data_start",
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
"""Deprecated: version 0.3 removes these names from this module. Each name stays in the module that is given here."""

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdamssConfig",
    "AdamssModel",
    "AdapterLayer",
    "AdapterNameError",
    "AdapterStore",
    "AdapterStoreError",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BOFTModel",
    "BdLoraConfig",
    "BeftConfig",
    "BeftModel",
    "BottleneckConfig",
    "C3AConfig",
    "C3AModel",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "CheckpointError",
    "ConfigError",
    "DeftConfig",
    "DeftModel",
    "DeloraConfig",
    "DeloraModel",
    "EvaConfig",
    "ExportError",
    "FourierFTConfig",
    "FourierFTModel",
    "FrodConfig",
    "FrodModel",
    "GgufError",
    "GloraConfig",
    "GloraModel",
    "GraloraConfig",
    "GraloraModel",
    "HRAConfig",
    "HRAModel",
    "HiraConfig",
    "HiraModel",
    "HotswapError",
    "IA3Config",
    "IA3Model",
    "KasaConfig",
    "LNTuningConfig",
    "LNTuningModel",
    "LilyConfig",
    "LilyModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoReftConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MergeError",
    "MissConfig",
    "MissModel",
    "MissingExtraError",
    "MontecloraConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "OFTConfig",
    "OFTModel",
    "OSFConfig",
    "OSFModel",
    "PeanutConfig",
    "PeanutModel",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PolyConfig",
    "PolyModel",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PsoftConfig",
    "PsoftModel",
    "PveraConfig",
    "PveraModel",
    "RandLoraConfig",
    "RandLoraModel",
    "RoadConfig",
    "RoadModel",
    "RoutingError",
    "ShadowConfig",
    "ShadowModel",
    "ShiraConfig",
    "ShiraModel",
    "SupertuningConfig",
    "SupertuningModel",
    "TargetError",
    "TaskType",
    "TinyLoraConfig",
    "TinyLoraModel",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "TrainingError",
    "UniLoraConfig",
    "UniLoraModel",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeloraConfig",
    "VeraConfig",
    "VeraModel",
    "WaveFTConfig",
    "WaveFTModel",
    "XLoraConfig",
    "XLoraModel",
    "add_as_lora",
    "bloom_model_postprocess_past_key_value",
    "calibrate_rounding",
    "cast_mixed_precision_params",
    "check_mergeable",
    "check_vllm",
    "compose_cartridge_adapters",
    "convert_adapters_directory",
    "convert_directory_to_lora",
    "convert_to_lora",
    "create_arrow_model",
    "dequantize_base",
    "export_gguf_lora",
    "export_gguf_merged",
    "export_vllm",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_dropout_masks",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "get_start_subtraction",
    "initialize_from_data",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_gguf_base",
    "load_peft_weights",
    "merge_streaming",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "refresh_adapters",
    "register_storage",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "save_gguf_base",
    "set_base_model_state_dict",
    "set_dropout_masks",
    "set_peft_model_state_dict",
    "set_start_subtraction",
    "shift_tokens_right",
    "tuner_names",
]


install_in_peftcore()
pickle_by_name(sys.modules[__name__])


def _third_party_configs() -> dict[str, Any]:
    methods = import_module("peftcore.registry").methods()
    configs = {method.config.__name__: method.config for method in methods.values()}
    return {name: config for name, config in configs.items() if name not in _MODULES}


def __getattr__(name: str) -> Any:
    if name in SUBMODULES:
        return import_module(f"peftcore.{name}")
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
