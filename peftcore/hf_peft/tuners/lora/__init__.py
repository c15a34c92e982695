"""`peft.tuners.lora`: LoRA's classes, and the functions around it."""

from typing import Any

from peftcore.conversion import convert_to_lora, save_as_lora
from peftcore.hf_peft.classes import layer_class
from peftcore.hf_peft.data_start import get_eva_state_dict, initialize_lora_eva_weights
from peftcore.hf_peft.default_targets import table
from peftcore.hf_peft.options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from peftcore.hf_peft.preprocess import preprocess_loraga
from peftcore.hf_peft.tuners.lora.arrow import create_arrow_model
from peftcore.injection.tuner_models import LoraModel
from peftcore.methods.lora import LoraConfig, LoraRuntimeConfig
from peftcore.methods.lora.variants.arrow import ArrowConfig
from peftcore.methods.lora.variants.bdlora import BdLoraConfig
from peftcore.methods.lora.variants.kasa import KasaConfig
from peftcore.methods.lora.variants.monteclora import MontecloraConfig
from peftcore.methods.lora.variants.velora import VeloraConfig

LoraLayer = layer_class("LoraLayer", "LORA", derived=("ADALORA",))
Linear = layer_class("Linear", "LORA", "linear")
Embedding = layer_class("Embedding", "LORA", "embedding")
Conv1d = layer_class("Conv1d", "LORA", "conv")
Conv2d = layer_class("Conv2d", "LORA", "conv")
Conv3d = layer_class("Conv3d", "LORA", "conv")
ParamWrapper = layer_class("ParamWrapper", "LORA", "parameter")
Linear4bit = layer_class("Linear4bit", "LORA", "linear")
Linear8bitLt = layer_class("Linear8bitLt", "LORA", "linear")

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "KasaConfig",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "ParamWrapper",
    "VeloraConfig",
    "convert_to_lora",
    "create_arrow_model",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_loraga",
    "save_as_lora",
]


def __getattr__(name: str) -> Any:
    return table(name, __name__)
