"""`peft.utils`: state dicts, names of files, and small tools that scripts import from there."""

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.config import TaskType
from peftcore.errors import PeftError
from peftcore.files import CONFIG_NAME
from peftcore.files.tensors import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peftcore.hf_peft.alias import is_submodule, submodule
from peftcore.hf_peft.classes import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from peftcore.hf_peft.data_start import shift_tokens_right
from peftcore.hf_peft.default_targets import is_table, table
from peftcore.hf_peft.functional import cast_adapter_dtype
from peftcore.hf_peft.precision import cast_mixed_precision_params
from peftcore.hf_peft.reexports import reexported
from peftcore.injection.loftq import replace_lora_weights_loftq
from peftcore.injection.targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from peftcore.model import prepare_model_for_kbit_training
from peftcore.registry import PeftType
from peftcore.storage.reading import load_peft_weights
from peftcore.storage.state_dict import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

WEIGHTS_NAME = "adapter_model.bin"
"""Name of a pickled adapter, which peftcore never reads."""

TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}
"""Empty: no architecture needs its prefixes converted, because they go through transformers' own caches."""

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "PeftError",
    "PeftType",
    "TaskType",
    "TrainableTokensWrapper",
    "bloom_model_postprocess_past_key_value",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "get_quantization_config",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "transpose",
]


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return (parent, module, its name in the parent); diffusers imports this function to remove adapters.

    Raises:
        AttributeError: the model has no module at this path.
    """
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), model.get_submodule(key), name


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return prefixes in the layout of Bloom's former cache; the present one takes prefixes as they are.

    Args:
        past_key_values: tensors (n, rows, heads, tokens, features), which hold the keys of all layers and then their
            values if they are joined.

    Returns:
        (key (rows·heads, features, tokens), value (rows·heads, tokens, features)) of each layer. The elements of a key
        are in HF PEFT's order, which exchanges heads and tokens; a trained prefix has learned that order.
    """
    keys, values = torch.cat(past_key_values).chunk(2)
    layers, rows, heads, tokens, features = keys.shape
    keys = keys.transpose(2, 3).reshape(layers, rows * heads, features, tokens)
    return tuple(zip(keys, values.flatten(1, 2), strict=True))


def infer_device() -> str:
    """Return the type of the accelerator that PyTorch can use now; "cpu" if there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """Return the model's quantisation options; None if the model is not quantised by this method.

    Args:
        model: a model.
        method: transformers' name of the method, such as "gptq".
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return the weight of a layer as (outputs, inputs), or as the layer stores it.

    Args:
        weight: a matrix; a parameter stays one.
        fan_in_fan_out: True to transpose it, for layers that store (inputs, outputs); False returns the weight itself.
    """
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T, weight.requires_grad) if isinstance(weight, nn.Parameter) else weight.T


def __getattr__(name: str) -> Any:
    if is_table(name):
        return table(name, __name__)
    return submodule(__name__, name) if is_submodule(__name__, name) else reexported(__name__, name)
