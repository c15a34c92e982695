"""Views of base layers: one small class for each kind of layer and weight storage."""

from typing import TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcore.bases.base import BaseWeight
from peftcore.bases.called_layers import calls_layer, kernel_reads
from peftcore.bases.compute_dtype import fast_dtype
from peftcore.bases.dequantize import replace_quantized
from peftcore.bases.gguf import GgufLinear
from peftcore.bases.norm import NormWeight, is_norm
from peftcore.bases.packed_copy import PackedCopyLinear, add_packed_copies
from peftcore.bases.parameter import BiasParameter, ParameterWeight
from peftcore.bases.plain import Conv1DWeight, ConvWeight, EmbeddingWeight, LinearWeight
from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.bases.quantized_linear import QuantizedLinear
from peftcore.bases.storages import register_storage, registered_classes, registered_view
from peftcore.errors import TargetError

__all__ = [
    "BaseWeight",
    "BiasParameter",
    "GgufLinear",
    "PackedCopyLinear",
    "ParameterWeight",
    "QuantizedLinear",
    "add_packed_copies",
    "base_weight",
    "calls_layer",
    "dequantize_model",
    "fast_dtype",
    "has_quantized_layers",
    "has_uncast_inputs",
    "is_adaptable",
    "keep_quantized_weights_trainable",
    "kernel_reads",
    "raw_projections",
    "refusal",
    "register_storage",
]

Model = TypeVar("Model", bound=nn.Module)

_PLAIN = {
    Conv1D: Conv1DWeight,
    nn.Linear: LinearWeight,
    nn.Conv1d: ConvWeight,
    nn.Conv2d: ConvWeight,
    nn.Conv3d: ConvWeight,
    nn.Embedding: EmbeddingWeight,
}

_OTHER_OUTPUTS = {"DeepseekV4GroupedLinear", "Llama4Router", "PhimoeTopKRouter"}
"""Subclasses of nn.Linear whose output is not x Wᵀ + b: routers return a tuple, grouped layers a block product."""


def _class_for(layer: nn.Module) -> type[BaseWeight] | None:
    if _OTHER_OUTPUTS & {base.__name__ for base in type(layer).__mro__}:
        return None
    if (registered := registered_view(layer)) is not None:
        return None if registered.refusal(layer) else registered
    plain = next((view for layer_class, view in _PLAIN.items() if isinstance(layer, layer_class)), None)
    return NormWeight if plain is None and is_norm(layer) else plain


def is_adaptable(layer: nn.Module) -> bool:
    """Return True if `base_weight` has a view for this layer."""
    return _class_for(layer) is not None


def has_uncast_inputs(model: nn.Module) -> bool:
    """Return True if a quantised layer of the model multiplies inputs of its own dtype only."""
    return any(issubclass(view, QuantizedLinear) for view in map(registered_view, model.modules()) if view is not None)


def has_quantized_layers(model: nn.Module) -> bool:
    """Return True if a layer of the model stores its weight in few bits, such as 4 or 8."""
    return any(view.quantized for view in map(registered_view, model.modules()) if view is not None)


def refusal(layer: nn.Module) -> str | None:
    """Return the reason why a layer of a registered storage cannot be adapted; None for every other layer."""
    view = registered_view(layer)
    return None if view is None else view.refusal(layer)


def raw_projections(layer: nn.Module) -> tuple[str, ...]:
    """Return the parameters that are adapted if an nn.MultiheadAttention is a target.

    Args:
        layer: Any module.

    Returns:
        Parameter paths relative to the module; () for a module of another class.

    Raises:
        TargetError: Query, key and value have different sizes, so the module has no fused `in_proj_weight`.
    """
    if not isinstance(layer, nn.MultiheadAttention):
        return ()
    if layer.in_proj_weight is None:
        raise TargetError(
            "this nn.MultiheadAttention has three separate matrices, because key or value has another size than the "
            "query; name them in target_parameters: q_proj_weight, k_proj_weight, v_proj_weight"
        )
    return "in_proj_weight", "out_proj.weight"


def base_weight(layer: nn.Module, path: str = "") -> BaseWeight:
    """Return the view of a base layer.

    Args:
        layer: The layer to adapt.
        path: The layer's path, for the error message.

    Raises:
        TargetError: Layers of this class cannot be adapted.
    """
    view = _class_for(layer)
    if view is None:
        fits = refusal(layer) or (
            "adapters support Linear, Conv1D, Conv1d/2d/3d, Embedding, norms, and quantised layers or weights of the "
            f"classes {', '.join(registered_classes())}; peftcore.register_storage adds others"
        )
        raise TargetError(f"{path or 'layer'} is a {type(layer).__name__}, which cannot be adapted; {fits}")
    return view(layer)


def dequantize_model(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Replace every quantised layer of a model without adapters by an `nn.Linear` with the same weight, in place.

    Args:
        model: A model; one without quantised layers stays as it is.
        dtype: Dtype of the new layers; None for the dtype in which each quantised layer multiplies.

    Returns:
        The model.
    """
    layers = {path: layer for path, layer in model.named_modules(remove_duplicate=False) if path}
    replace_quantized(
        model, {path: base_weight(each, path) for path, each in layers.items() if is_adaptable(each)}, dtype
    )
    return model
