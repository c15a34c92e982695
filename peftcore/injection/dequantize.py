"""Plain layers in place of quantised ones, with the weights that the quantised layers compute with."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from peftcore.bases import BaseWeight, base_weight, is_adaptable
from peftcore.bases.dequantize import replace_quantized, unquantized_dtype
from peftcore.errors import MergeError, TargetError
from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.wrapper import LayerWrapper, unwrapped

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def dequantize_base(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Replace every quantised layer of a model by an `nn.Linear` with the same weight, in place.

    Adapters stay, on the plain layers. Merging them afterwards rounds nothing to few bits, and `save_pretrained` of a
    transformers model writes a plain checkpoint.

    Args:
        model: A model with quantised layers, with or without adapters.
        dtype: Dtype of the new layers; None for the dtype of the model's other weights, or of a model of quantised
            layers only, for the dtype in which each layer multiplies (float32 for bitsandbytes' 8-bit layers).

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
        if isinstance(module, AdapterLayer) and module.merged_names and module.base.quantized:
            raise MergeError(
                f"dequantize_base: {list(module.merged_names)} are merged into the quantised layer {path}; call "
                "unmerge_adapter first, and merge after dequantize_base"
            )
    layers = {id(base.layer) for base in quantized.values()}
    others = [layer for layer in map(unwrapped, ModuleIndex(model).modules.values()) if id(layer) not in layers]
    replace_quantized(model, quantized, dtype or unquantized_dtype(others))
    return model


def _bases(modules: Mapping[str, nn.Module]) -> dict[str, BaseWeight]:
    layers = {path: module for path, module in modules.items() if path and not isinstance(module, LayerWrapper)}
    return {path: base_weight(layer, path) for path, layer in layers.items() if is_adaptable(layer)}
