"""`peft.utils.other`."""

import functools
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from peftcore.errors import ConfigError
from peftcore.hf_peft.default_targets import table
from peftcore.hf_peft.utils import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    _get_submodules,
    cast_mixed_precision_params,
    get_quantization_config,
    infer_device,
    prepare_model_for_kbit_training,
    shift_tokens_right,
    transpose,
)

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_get_submodules",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "get_pattern_key",
    "get_quantization_config",
    "infer_device",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "transpose",
]


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., Any]:
    """Return the policy by which FSDP version 1 wraps a model: each transformer block; use it with `use_orig_params`.

    HF PEFT also wraps each layer of an adapter. Here an adapter's parameters are read by the layer that it adapts, so
    they must be in the same unit as that layer.

    Args:
        model: a model with adapters. The environment variable FSDP_TRANSFORMER_CLS_TO_WRAP names the classes of its
            blocks, separated by commas; without it, a transformers model names them.

    Raises:
        ConfigError: the model has no module of a named class.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy  # here, because it imports much

    of_model = ",".join(getattr(model, "_no_split_modules", None) or ())
    named = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", of_model).split(",") if name]
    present = {type(module).__name__: type(module) for module in model.modules()}
    if missing := [name for name in named if name not in present]:
        raise ConfigError(
            f"fsdp_auto_wrap_policy: {type(model).__name__} has no module of the class {missing[0]}; set "
            "FSDP_TRANSFORMER_CLS_TO_WRAP to the class of its blocks"
        )
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={present[name] for name in named})


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """Return the first key of `rank_pattern` or `alpha_pattern` that matches the end of a path; else the path itself.

    Args:
        pattern_keys: regular expressions.
        key_to_match: the path of a module, such as "model.layers.0.self_attn.q_proj".
    """
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def __getattr__(name: str) -> Any:
    return table(name, __name__)
