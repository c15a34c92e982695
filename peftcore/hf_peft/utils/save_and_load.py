"""`peft.utils.save_and_load`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftcore.hf_peft.reexports import reexported
from peftcore.hf_peft.utils import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

__all__ = [
    "_insert_adapter_name_into_state_dict",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def _insert_adapter_name_into_state_dict(
    state_dict: Mapping[str, Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, Tensor]:
    """Return a saved adapter's state dict under HF PEFT's names of parameters.

    Args:
        state_dict: {name, such as "q.lora_A.weight": tensor}.
        adapter_name: the name to insert: "q.lora_A.default.weight".
        parameter_prefix: start of the method's parameter names, such as "lora_"; other names stay.
    """
    return {_with_adapter_name(key, adapter_name, parameter_prefix): tensor for key, tensor in state_dict.items()}


def _with_adapter_name(key: str, adapter_name: str, parameter_prefix: str) -> str:
    start, prefix, end = key.rpartition(parameter_prefix)
    if not prefix:
        return key
    parameter, dot, rest = end.partition(".")
    return f"{start}{prefix}{parameter}.{adapter_name}{dot}{rest}"


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
