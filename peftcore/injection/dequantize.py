"""Plain layers in place of quantised ones, with the weights that the quantised layers compute with."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from peftcore.bases import BaseWeight, base_weight, is_adaptable
from peftcore.errors import MergeError, TargetError
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.wrapper import LayerWrapper

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def dequantize_base(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Replace every quantised layer of a model by an `nn.Linear` with the same weight, in place.

    Adapters stay, on the plain layers. Merging them afterwards rounds nothing to few bits, and `save_pretrained` of a
    transformers model writes a plain checkpoint.

    Args:
        model: A model with quantised layers, with or without adapters.
        dtype: Dtype of the new layers; None for the dtype in which each quantised layer multiplies, float32 for
            bitsandbytes' 8-bit layers.

    Returns:
        The model.

    Raises:
        MergeError: Adapters are merged into a quantised layer.
        TargetError: The model has no quantised layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    quantized = {path: base for path, base in _bases(modules).items() if base.quantized}
    if not quantized:
        raise TargetError(f"dequantize_base: {type(model).__name__} has no quantised layer")
    for path, module in modules.items():
        if isinstance(module, AdapterLayer) and module.merged and module.base.quantized:
            raise MergeError(
                f"dequantize_base: {list(module.merged)} are merged into the quantised layer {path}; call "
                "unmerge_adapter first, and merge after dequantize_base"
            )
    plain = {id(base.layer): _plain(base, dtype) for base in {id(b.layer): b for b in quantized.values()}.values()}
    for path, base in quantized.items():
        owner, _, name = path.rpartition(".")
        modules[owner]._modules[name] = plain[id(base.layer)]
    _forget_quantisation(model)
    return model


def _bases(modules: Mapping[str, nn.Module]) -> dict[str, BaseWeight]:
    layers = {path: module for path, module in modules.items() if path and not isinstance(module, LayerWrapper)}
    return {path: base_weight(layer, path) for path, layer in layers.items() if is_adaptable(layer)}


def _plain(base: BaseWeight, dtype: torch.dtype | None) -> nn.Linear:
    """Return an `nn.Linear` with the current weight and bias of a quantised layer."""
    dtype = dtype or base.activation_dtype or base.dtype
    layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    for name, value in (("weight", base.read()), ("bias", base.bias)):
        if value is not None:
            layer._parameters[name] = nn.Parameter(
                value.detach().to(dtype, copy=True).contiguous(), requires_grad=False
            )
    return layer.train(base.layer.training)


def _forget_quantisation(model: Any) -> None:
    """Remove what transformers notes about the storage of a model, so that the model is saved as a plain one."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    elif getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config
