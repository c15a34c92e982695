"""Checks that a plain LoRA can replace an adapter: the adapter must only add ΔW to weights that a LoRA can change."""

from torch import nn

from peftcore.errors import AdapterNameError, ConfigError, ConversionError, MergeError
from peftcore.injection.adapter_set import AdapterSet, adapter_set
from peftcore.injection.merge import check_mergeable
from peftcore.methods.lora import LoraConfig

KINDS = ("linear", "conv", "embedding")
"""Kinds of layers whose weight a LoRA can change by two factors."""


def check_convertible(model: nn.Module, name: str) -> None:
    """Check that a plain LoRA can replace an adapter, exactly or approximately.

    Args:
        model: the model with the adapter.
        name: the adapter.

    Raises:
        ConversionError: the model has no adapters, or the adapter does more than add ΔW to weights.
        MergeError: no weight equals the adapter, or it is merged now.
        AdapterNameError: the adapter is not loaded.
    """
    adapters = _adapters_of(model)
    adapters.require(name)
    if name in adapters.merged:
        raise MergeError(f"adapter {name!r} is merged into the base; call unmerge_adapter first")
    _check(model, adapters, name)


def is_convertible(model: nn.Module, name: str) -> bool:
    """Return True if a plain LoRA can replace an adapter, which may be merged now.

    Args:
        model: the model with the adapter.
        name: the adapter.

    Raises:
        AdapterNameError: the adapter is not loaded.
    """
    adapters = adapter_set(model)
    adapters.require(name)
    try:
        _check(model, adapters, name)
    except (ConversionError, MergeError):
        return False
    return True


def _adapters_of(model: nn.Module) -> AdapterSet:
    try:
        return adapter_set(model)
    except AdapterNameError as error:
        raise ConversionError(f"nothing to convert: {error}") from error


def _check(model: nn.Module, adapters: AdapterSet, name: str) -> None:
    config = adapters.configs[name]
    if name in adapters.prompts:
        raise ConversionError(f"{name!r} is a prompt ({config.method}), which no LoRA can replace; use it as it is")
    if adapters.replication is not None:
        raise ConversionError("layer_replication adds layers to the model, which plain LoRA does not; merge it instead")
    try:
        config.check_beside(LoraConfig())
    except ConfigError as error:
        raise ConversionError(f"no plain LoRA can take the place of {name!r}: {error}") from error
    for path, adapter in adapters.adapters(name).items():
        if adapter.base.kind not in KINDS:
            raise ConversionError(
                f"{path} is a {adapter.base.kind}, which plain LoRA does not change; merge the adapter instead"
            )
        if adapter.bias_change() is not None:
            raise ConversionError(
                f"{path}: {config.method} changes the layer's bias too, which plain LoRA does not; merge the "
                "adapter instead"
            )
    check_mergeable(model, [name])
