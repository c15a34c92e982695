"""`peft.tuners.lora`: LoRA's classes, and the functions around it."""

from typing import Any

from peftcore.conversion import convert_to_lora, save_as_lora
from peftcore.hf_peft.alias import is_submodule, submodule
from peftcore.hf_peft.classes import layer_class, layer_classes
from peftcore.hf_peft.data_start import (
    forward_fn_dict,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from peftcore.hf_peft.default_targets import is_table, table
from peftcore.hf_peft.options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from peftcore.hf_peft.preprocess import preprocess_loraga
from peftcore.hf_peft.reexports import reexported
from peftcore.hf_peft.tuners.lora.arrow import create_arrow_model
from peftcore.injection.tuner_models import LoraModel
from peftcore.methods.lora import LoraConfig, LoraRuntimeConfig
from peftcore.methods.lora.variants.arrow import ArrowConfig
from peftcore.methods.lora.variants.bdlora import BdLoraConfig
from peftcore.methods.lora.variants.kasa import KasaConfig
from peftcore.methods.lora.variants.monteclora import MontecloraConfig
from peftcore.methods.lora.variants.velora import VeloraConfig

LoraLayer = layer_class("LoraLayer", "LORA", derived=("ADALORA",))
_CLASSES = layer_classes("LORA")
Linear = _CLASSES["Linear"]
Embedding = _CLASSES["Embedding"]
Conv1d = _CLASSES["Conv1d"]
Conv2d = _CLASSES["Conv2d"]
Conv3d = _CLASSES["Conv3d"]
ParamWrapper = _CLASSES["ParamWrapper"]
Linear4bit = _CLASSES["Linear4bit"]
Linear8bitLt = _CLASSES["Linear8bitLt"]
AwqLoraLinear = _CLASSES["AwqLoraLinear"]
GPTQLoraLinear = _CLASSES["GPTQLoraLinear"]
HqqLoraLinear = _CLASSES["HqqLoraLinear"]
LoraParallelLinear = layer_class("LoraParallelLinear", "LORA", lambda base: False)  # Megatron's layers are refused

__all__ = [
    "ArrowConfig",
    "AwqLoraLinear",
    "BdLoraConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "KasaConfig",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraParallelLinear",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "ParamWrapper",
    "VeloraConfig",
    "convert_to_lora",
    "create_arrow_model",
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
    "preprocess_loraga",
    "save_as_lora",
]


def __getattr__(name: str) -> Any:
    if is_table(name):
        return table(name, __name__)
    return submodule(__name__, name) if is_submodule(__name__, name) else reexported(__name__, name)
