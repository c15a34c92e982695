"""Linear layers of torchao (https://docs.pytorch.org/ao) with weights in 1 to 8 bits."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases.quantized_linear import QuantizedLinear
from peftcore.bases.storages import register_storage

_ROUNDS_INPUTS = {
    "Int8Tensor": ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point"),
    "IntxUnpackedToInt8Tensor": ("activation_quantization",),
}
"""{class of a weight: its attributes that say how the layer rounds its input}."""


@register_storage("torchao.TorchAOBaseTensor")
class TorchaoWeight(QuantizedLinear):
    """`nn.Linear` whose weight is an `Int8Tensor` or `IntxUnpackedToInt8Tensor` of torchao.

    The first is the weight of `Int8WeightOnlyConfig`; the second, that of `IntxWeightOnlyConfig`, whose codes of 1 to 8
    bits take a byte each. The configurations with dynamic activations have the same weights, and the layer rounds its
    input to 8 bits. The input of an adapter is not rounded, nor is the gradient of the input.
    """

    backend = "torchao"

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        weight = layer.weight
        scales_inputs = getattr(weight, "act_pre_scale", None) is not None
        if isinstance(layer, nn.Linear) and type(weight).__name__ in _ROUNDS_INPUTS and not scales_inputs:
            return None
        kind = f"{type(weight).__name__}{' with scaled inputs' if scales_inputs else ''}"
        return (
            f"its weight is torchao's {kind}; quantise linear layers with Int8WeightOnlyConfig, or with "
            f"IntxWeightOnlyConfig for 1 to 8 bits, whose weights are {' and '.join(_ROUNDS_INPUTS)}"
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight_dtype, torch.float32)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    def codes(self, state: Mapping[str, Any]) -> Tensor:
        return self.stored(state).qdata

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        weight = self.stored(state)
        if type(weight).__name__ == "Int8Tensor":
            return weight.dequantize(self.dtype)
        return weight.dequantize().to(self.dtype)

    def write(self, weight: Tensor) -> None:
        old = self.layer.weight
        dense = weight.to(old.dtype).contiguous()
        self.layer._parameters["weight"] = nn.Parameter(_quantized_like(old, dense), requires_grad=False)

    def multiplies(self, dtype: torch.dtype) -> bool:
        return dtype == self.weight_dtype or (
            type(self.layer.weight).__name__ == "Int8Tensor" and dtype.is_floating_point
        )


def _quantized_like(old: Any, dense: Tensor) -> Tensor:
    """Return a dense weight in another weight's storage: the same bits, blocks, zero points, and rounding of inputs."""
    mappings: Any = import_module("torchao.quantization.quant_primitives").MappingType
    has_zero_points = old.zero_point is not None and bool(old.zero_point.any())
    mapping = mappings.ASYMMETRIC if has_zero_points else mappings.SYMMETRIC
    names = _ROUNDS_INPUTS[type(old).__name__]
    rounding = {name: value for name in names if (value := getattr(old, name, None)) is not None}
    if type(old).__name__ != "Int8Tensor":
        return type(old).from_hp(dense, old.block_size, old.target_dtype, mapping_type=mapping, **rounding)
    granularity: Any = import_module("torchao.quantization.granularity")
    rows, columns = old.block_size
    if rows != 1:
        blocks = granularity.PerTensor()
    else:
        blocks = granularity.PerRow() if columns == old.shape[1] else granularity.PerGroup(columns)
    return type(old).from_hp(dense, granularity=blocks, mapping_type=mapping, reduce_range=old.reduce_range, **rounding)
