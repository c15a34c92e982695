"""Base layers: one small class per kind of layer and storage, found from the layer itself."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcore.bases.base import BaseWeight
from peftcore.bases.norm import NormWeight, is_norm
from peftcore.bases.parameter import BiasParameter, ParameterWeight
from peftcore.bases.plain import Conv1DWeight, ConvWeight, EmbeddingWeight, LinearWeight
from peftcore.bases.quantized import EightBitWeight, FourBitWeight, keep_quantized_weights_trainable
from peftcore.errors import TargetError

__all__ = [
    "BaseWeight",
    "BiasParameter",
    "ParameterWeight",
    "base_weight",
    "calls_its_layers",
    "is_adaptable",
    "keep_quantized_weights_trainable",
    "raw_projections",
]

_QUANTIZED = {"Params4bit": FourBitWeight, "Int8Params": EightBitWeight}
_PLAIN = {
    Conv1D: Conv1DWeight,
    nn.Linear: LinearWeight,
    nn.Conv1d: ConvWeight,
    nn.Conv2d: ConvWeight,
    nn.Conv3d: ConvWeight,
    nn.Embedding: EmbeddingWeight,
}


def _class_for(layer: nn.Module) -> type[BaseWeight] | None:
    weight = getattr(layer, "weight", None)
    if type(weight).__name__ in _QUANTIZED:
        return _QUANTIZED[type(weight).__name__]
    plain = next((view for kind, view in _PLAIN.items() if isinstance(layer, kind)), None)
    return NormWeight if plain is None and is_norm(layer) else plain


def is_adaptable(layer: nn.Module) -> bool:
    """Whether `base_weight` knows this kind of layer."""
    return _class_for(layer) is not None


_READS_WEIGHTS = {"MultiheadAttention", "WavLMAttention"}
"""Classes whose forward hands the weights of their layers to one function and never calls the layers."""


def calls_its_layers(parent: nn.Module) -> bool:
    """Whether a module calls its child layers, so that an adapter on one of them acts."""
    return not _READS_WEIGHTS & {kind.__name__ for kind in type(parent).__mro__}


def raw_projections(layer: nn.Module) -> tuple[str, ...]:
    """Parameters that stand for an nn.MultiheadAttention when it is a target; () for any other module.

    Raises TargetError where query, key and value have sizes of their own.
    """
    if not isinstance(layer, nn.MultiheadAttention):
        return ()
    if layer.in_proj_weight is None:
        raise TargetError(
            "an nn.MultiheadAttention with other sizes for key or value keeps three matrices; name them in "
            "target_parameters: q_proj_weight, k_proj_weight, v_proj_weight"
        )
    return "in_proj_weight", "out_proj.weight"


def base_weight(layer: nn.Module, path: str = "") -> BaseWeight:
    """The view on `layer`; TargetError names the kinds that fit when this one does not."""
    view = _class_for(layer)
    if view is None:
        raise TargetError(
            f"{path or 'layer'} is a {type(layer).__name__}, which cannot be adapted; "
            "Linear, Conv1D, Conv1d/2d/3d, Embedding, norms and bitsandbytes' 4- and 8-bit linears can"
        )
    return view(layer)
