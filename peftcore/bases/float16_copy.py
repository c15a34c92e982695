"""Float32 linear layers with a second copy of their weight in float16, for decoding on CPUs.

With few tokens, a product takes about as long as reading the weight. The copy has half the bytes, and FBGEMM's product
with it multiplies and adds in float32. `benchmarks.serving` shows what that saves. PyTorch has two names for that
product. `torch.fbgemm_linear_fp16_weight_fp32_activation` is called, because a call of it takes 4 us, where one of
`torch.ops.quantized.linear_dynamic_fp16` takes 19; but PyTorch may remove it, and then the other name is called.

The copy of a weight that was loaded from 16 bits is exact, except that bfloat16 values below 2⁻¹⁷ (8e-6) lose bits:
they are rounded to multiples of 2⁻²⁴ (6e-8). That is less than the rounding of a float32 product. Other float32
weights, such as dequantised ones, are rounded to 11 bits.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases.plain import LinearWeight
from peftcore.bases.storages import register_storage

MAX_TOKENS = 128
"""Largest number of tokens for which the copy is used; from there on the product in float32 is as fast."""
_ENGINES = ("x86", "fbgemm")
"""PyTorch's quantisation engines (`torch.backends.quantized.engine`) that have the product."""


Product = Callable[[Tensor, Tensor | None], Tensor]
"""x (..., i), b (o,) -> x Wᵀ + b (..., o) with a packed weight."""


@dataclass(frozen=True, eq=False)
class _Copy:
    """A packed float16 copy of a weight, and the state of the weight of which it is a copy."""

    weight: Tensor | None
    version: int
    """In-place changes of the weight (count)."""
    address: int
    """Where the weight's values are in memory."""
    product: Any
    """Its `Product`; None in a duplicate of the layer."""

    @classmethod
    def of(cls, weight: Tensor) -> "_Copy":
        return cls(weight, weight._version, weight.data_ptr(), _product_with(weight.detach()))

    def is_current(self, weight: Any) -> bool:
        return weight is self.weight and weight._version == self.version and weight.data_ptr() == self.address

    def __reduce__(self) -> Any:
        """Leave the packed weight out of deep copies and pickles of the layer; they use the float32 weight."""
        return _no_copy, ()


def _no_copy() -> _Copy:
    return _Copy(None, 0, 0, None)


def _product_with(weight: Tensor) -> Product:
    """Return the product with a float16 copy of a weight (o, i)."""
    if not hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation"):
        dynamic, packed = torch.ops.quantized.linear_dynamic_fp16, torch.ops.quantized.linear_prepack_fp16(weight, None)
        return lambda x, bias: dynamic(x, packed) if bias is None else dynamic(x, packed).add_(bias)
    linear = torch.fbgemm_linear_fp16_weight_fp32_activation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated; PyTorch says so once, at the first call of each function
        packed = torch.fbgemm_pack_gemm_matrix_fp16(weight)
        linear(weight[:1], packed, None)
    return lambda x, bias: linear(x, packed, bias)


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
        self._copy = _Copy.of(layer.weight)

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
        return self._copy.product(x, bias)


@register_storage("peftcore.Float16CopyLinear")
class Float16CopyWeight(LinearWeight):
    """`Float16CopyLinear`: every change of the weight is made in float32, and ends the use of the copy."""

    layer_class = Float16CopyLinear
    product_takes_any_dtype = True  # type: ignore[assignment]

    def product(self, x: Tensor) -> Tensor:
        y = self.layer.short_output(x)
        return super().product(x) if y is None else y

    def plain_output(self, x: Tensor) -> Tensor | None:
        y = self.layer.short_output(x) if type(self.layer) is Float16CopyLinear else None
        return super().plain_output(x) if y is None else y


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
