"""`peft.utils.other`."""

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.hf_peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    cast_mixed_precision_params,
    infer_device,
    prepare_model_for_kbit_training,
)

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "infer_device",
    "prepare_model_for_kbit_training",
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


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return the weight of a layer as (outputs, inputs), or as the layer stores it.

    Args:
        weight: a matrix; a parameter stays one.
        fan_in_fan_out: True to transpose it, for layers that store (inputs, outputs); False returns the weight itself.
    """
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T, weight.requires_grad) if isinstance(weight, nn.Parameter) else weight.T
