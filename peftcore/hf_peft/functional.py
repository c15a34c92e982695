"""`peft.functional`: adapters in models whose class stays as it is, as transformers and diffusers use them."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftcore.errors import ConfigError
from peftcore.hf_peft.classes import BaseTunerLayer
from peftcore.hf_peft.reexports import reexported
from peftcore.injection import activation
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.inject import inject_adapter_in_model
from peftcore.storage.state_dict import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def _all_layers(function: str, layer_cls: Any) -> None:
    """Raise ConfigError for a class that names only some layers, because the adapters of a model belong together."""
    if layer_cls is not BaseTunerLayer:
        raise ConfigError(f"{function}: layer_cls must be BaseTunerLayer; got {layer_cls!r:.200}")


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: Any = BaseTunerLayer
) -> None:
    """Make adapters the active ones; their parameters then train, and those of all others do not.

    Args:
        model: a model with adapters.
        adapter_name: one name or several, in order.
        inference_mode: True freezes the active adapters, too.
        layer_cls: only BaseTunerLayer.

    Raises:
        AdapterNameError: a name is not loaded.
    """
    _all_layers("set_adapter", layer_cls)
    activation.set_adapter(model, adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = BaseTunerLayer) -> list[str]:
    """Delete an adapter.

    Args:
        model: a model with adapters.
        adapter_name: the adapter. As in HF PEFT, nothing is deleted if it is not loaded; a warning says so.
        prefix: the start of parameter names of the method, such as "lora_"; checked against the adapter's own.
        layer_cls: only BaseTunerLayer.

    Returns:
        The adapters that are active then; [] if none is.

    Raises:
        AdapterNameError: the model has no adapters.
        ConfigError: the adapter's parameters do not begin with `prefix`.
    """
    _all_layers("delete_adapter", layer_cls)
    adapters = adapter_set(model)
    if adapter_name not in adapters.configs:
        warnings.warn(f"delete_adapter: {adapter_name!r} is not loaded, so nothing is deleted", stacklevel=2)
        return list(adapters.selection.active)
    names = {key for part in adapters.of_method(adapter_name).values() for key in part.checkpoint_keys().values()}
    if prefix and names and not any(name.startswith(prefix) for name in names):
        raise ConfigError(
            f"delete_adapter: {adapter_name!r} has parameters {sorted(names)}, none with prefix {prefix!r}; leave "
            "prefix out"
        )
    activation.delete_adapter(model, adapter_name)
    return list(adapters.selection.active)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Set `requires_grad` of all parameters of adapters.

    Args:
        model: a model with adapters.
        adapter_names: one name or several.
        requires_grad: False freezes the adapters.

    Raises:
        AdapterNameError: a name is not loaded.
    """
    activation.set_requires_grad(
        model, adapter_names if isinstance(adapter_names, str) else list(adapter_names), requires_grad
    )


@torch.no_grad()
def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Cast an adapter's parameters of 16 or fewer bits to float32.

    Args:
        model: a model with adapters.
        adapter_name: the adapter.
        autocast_adapter_dtype: False changes nothing.

    Raises:
        AdapterNameError: the adapter is not loaded.
    """
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    if not autocast_adapter_dtype:
        return
    for parameter in adapters.parameters(adapter_name):
        if parameter.is_floating_point() and parameter.itemsize < 4:
            parameter.data = parameter.data.float()
    activation.refresh_adapters(model)


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
