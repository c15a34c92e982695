"""Float32 linear layers with a second copy of their weight in float16, for decoding on CPUs.

With few tokens, a product takes about as long as reading the weight. The copy has half the bytes, and PyTorch's product
with it (FBGEMM's, `torch.ops.quantized.linear_dynamic_fp16`) multiplies and adds in float32. `benchmarks.serving` shows
what that saves.

The copy of a weight that was loaded from 16 bits is exact, except that bfloat16 values below 2⁻¹⁷ (8e-6) lose bits:
they are rounded to multiples of 2⁻²⁴ (6e-8). That is less than the rounding of a float32 product. Other float32
weights, such as dequantised ones, are rounded to 11 bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.bases.plain import LinearWeight
from peftcore.bases.storages import register_storage

MAX_TOKENS = 128
"""Largest number of tokens for which the copy is used; from there on the product in float32 is as fast."""
_ENGINES = ("x86", "fbgemm")
"""PyTorch's quantisation engines (`torch.backends.quantized.engine`) that have the product."""


class _Copy(NamedTuple):
    """A packed float16 copy of a weight, and the state of the weight of which it is a copy."""

    weight: Tensor
    version: int
    """In-place changes of the weight (count)."""
    address: int
    """Where the weight's values are in memory."""
    packed: Any

    def is_current(self, weight: Any) -> bool:
        return weight is self.weight and weight._version == self.version and weight.data_ptr() == self.address


class Float16CopyLinear(nn.Linear):
    """A linear layer that multiplies few tokens by a float16 copy of its weight, without gradients.

    It has the parameters of the layer that it replaces. When the weight is replaced or changes in place, the copy is
    not used any more. PyTorch does not count changes in place through `.data`, so do not change the weight that way.

    Args:
        layer: A layer that `can_copy` accepts.

    Shapes: x (..., i), weight (o, i), bias (o,), output (..., o).
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear's would make new parameters
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        self.train(layer.training)
        weight = layer.weight
        packed = torch.ops.quantized.linear_prepack_fp16(weight.detach(), None)
        self._copy = _Copy(weight, weight._version, weight.data_ptr(), packed)

    def forward(self, input: Tensor) -> Tensor:
        y = self.short_output(input)
        return super().forward(input) if y is None else y

    def short_output(self, x: Tensor) -> Tensor | None:
        """Return the output by the copy, in new memory; None for inputs and modes that need the float32 weight."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if (
            torch.is_grad_enabled()
            or x.dim() < 2
            or not 0 < x.numel() <= MAX_TOKENS * self.in_features
            or x.dtype is not torch.float32
            or not self._copy.is_current(weight)
            or torch._C._is_any_autocast_enabled()
            or torch.compiler.is_compiling()
            or torch._C._is_tracing()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        y = torch.ops.quantized.linear_dynamic_fp16(x, self._copy.packed)
        return y if bias is None else y.add_(bias)


@register_storage("peftcore.Float16CopyLinear")
class Float16CopyWeight(LinearWeight):
    """`Float16CopyLinear`: every change of the weight is made in float32, and ends the use of the copy."""

    layer_class = Float16CopyLinear
    product_takes_any_dtype = True  # type: ignore[assignment]

    def product(self, x: Tensor) -> Tensor:
        y = self.layer.short_output(x)
        return super().product(x) if y is None else y


def can_copy(layer: nn.Module) -> bool:
    """Return True for a float32 `nn.Linear` without hooks on a CPU whose weight float16 can hold.

    PyTorch must have the product, too; on CPUs that are not x86 it has not.
    """
    if type(layer) is not nn.Linear or torch.backends.quantized.engine not in _ENGINES:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32 or not weight.is_cpu or not weight.numel():
        return False
    return not weight.is_inference() and bool(weight.detach().abs().max() <= torch.finfo(torch.float16).max)


def add_float16_copies(model: nn.Module) -> int:
    """Replace every layer that `can_copy` accepts by a `Float16CopyLinear` with the same parameters, in place.

    The copies take half as much memory as the float32 weights. Call it before the model gets adapters.

    Args:
        model: A model in float32 that will not be trained.

    Returns:
        The number of layers that have a copy now.
    """
    layers = {path: layer for path, layer in model.named_modules(remove_duplicate=False) if path and can_copy(layer)}
    copies = {layer: Float16CopyLinear(layer) for layer in dict.fromkeys(layers.values())}  # type: ignore[arg-type]
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, copies[layer])
    return len(copies)
