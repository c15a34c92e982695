"""Linear layers with a second copy of their weight that CPUs multiply by faster.

With few tokens, a product takes about as long as reading the weight. `benchmarks.serving` shows what the copies save.

- **bfloat16**: the same values in the order in which compiled C reads them (`compiled/packed_product.py`). So 1 token
  and 16 tokens take half of the time, and 512 tokens 0.92 (all layers of SmolLM2-135M on 2 cores of an AMD EPYC with
  AVX-512). Where there is no such code, in the order in which oneDNN reads them, by an operation that `torch.compile`
  uses: 0.72, 0.65 and 0.95.
- **float32**: half of the bytes in float16, for few tokens. FBGEMM's product with them multiplies and adds in float32.
  The copy of a weight that was loaded from 16 bits is exact, except that bfloat16 values below 2⁻¹⁷ (8e-6) lose bits:
  they are rounded to multiples of 2⁻²⁴ (6e-8). That is less than the rounding of a float32 product. Other float32
  weights, such as dequantised ones, are rounded to 11 bits. PyTorch has two names for the product.
  `torch.fbgemm_linear_fp16_weight_fp32_activation` is called, because a call of it takes 4 us, where one of
  `torch.ops.quantized.linear_dynamic_fp16` takes 19; but PyTorch may remove it, and then the other name is called.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases.compute_dtype import fast_dtype
from peftcore.bases.plain import LinearWeight
from peftcore.bases.storages import register_storage
from peftcore.compiled.packed_product import packed_product

logger = logging.getLogger(__name__)

MOST_TOKENS = {torch.float32: 128, torch.bfloat16: 2**62}
"""{dtype: largest number of tokens for which the copy is used}. With more, a product in float32 is as fast as one with
float16."""
SHARE_OF_MEMORY = 0.5
"""Largest share of the free memory that copies may take (0 to 1)."""
_ENGINES = ("x86", "fbgemm")
"""PyTorch's quantisation engines (`torch.backends.quantized.engine`) that have the product with float16 weights."""


Product = Callable[[Tensor, Tensor | None], Tensor | None]
"""x (..., i), b (o,) -> x Wᵀ + b (..., o) with a packed weight; None for inputs that need the weight itself."""


@dataclass(frozen=True, eq=False)
class _Copy:
    """A packed copy of a weight, and the state of the weight of which it is a copy."""

    weight: Tensor | None
    version: int
    """In-place changes of the weight (count)."""
    address: int
    """Where the weight's values are in memory."""
    dtype: torch.dtype | None
    """The weight's dtype, and that of the inputs and outputs of the product."""
    most_elements: int
    """Largest number of elements of an input for which the copy is used."""
    product: Any
    """Its `Product`; None in a duplicate of the layer."""

    @classmethod
    def of(cls, weight: Tensor) -> "_Copy":
        most = MOST_TOKENS[weight.dtype] * weight.shape[1]
        return cls(weight, weight._version, weight.data_ptr(), weight.dtype, most, _product_with(weight.detach()))

    def is_current(self, weight: Any) -> bool:
        return weight is self.weight and weight._version == self.version and weight.data_ptr() == self.address

    def __reduce__(self) -> Any:
        """Leave the packed weight out of deep copies and pickles of the layer; they use the weight itself."""
        return _no_copy, ()


def _no_copy() -> _Copy:
    return _Copy(None, 0, 0, None, 0, None)


def _product_with(weight: Tensor) -> Product:
    """Return the product with a packed copy of a weight (o, i)."""
    if weight.dtype is torch.bfloat16:
        if (own := packed_product(weight)) is not None:
            return own
        reordered, product = torch.ops.mkldnn._reorder_linear_weight(weight, None), _onednn()
        return lambda x, bias: product(x, reordered, bias, "none", [], "")
    if not hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation"):
        dynamic, packed = torch.ops.quantized.linear_dynamic_fp16, torch.ops.quantized.linear_prepack_fp16(weight, None)
        return lambda x, bias: dynamic(x, packed) if bias is None else dynamic(x, packed).add_(bias)
    linear = torch.fbgemm_linear_fp16_weight_fp32_activation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated; PyTorch says so once, at the first call of each function
        packed = torch.fbgemm_pack_gemm_matrix_fp16(weight)
        linear(weight[:1], packed, None)
    return lambda x, bias: linear(x, packed, bias)


def _onednn() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


@cache
def packs_bfloat16() -> bool:
    """Return True if there is compiled C for bfloat16, or PyTorch has oneDNN's operations.

    These are not public, so a version may lack them.
    """
    try:
        one = torch.eye(16, dtype=torch.bfloat16, device="cpu")
        with torch.no_grad():
            return torch.equal(_product_with(one)(one, None), one)  # type: ignore[arg-type]
    except (AttributeError, TypeError, RuntimeError) as error:
        logger.info("weights cannot be packed in bfloat16: %s", error)
        return False


class PackedCopyLinear(nn.Linear):
    """A linear layer that multiplies by a packed copy of its weight, without gradients.

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
        y = self.packed_output(input)
        return super().forward(input) if y is None else y

    def packed_output(self, x: Tensor) -> Tensor | None:
        """Return the output by the copy, in new memory; None for inputs and modes that need the weight itself."""
        weight, bias, copy = self._parameters["weight"], self._parameters["bias"], self._copy
        if (
            torch.is_grad_enabled()
            or x.dim() < 2
            or not 0 < x.numel() <= copy.most_elements
            or x.dtype is not copy.dtype
            or not copy.is_current(weight)
            or torch._C._is_any_autocast_enabled()
            or torch.compiler.is_compiling()
            or torch._C._is_tracing()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        return copy.product(x, bias)


@register_storage("peftcore.PackedCopyLinear")
class PackedCopyWeight(LinearWeight):
    """`PackedCopyLinear`: every change is made to the weight itself, and ends the use of the copy."""

    layer_class = PackedCopyLinear
    product_takes_any_dtype = True  # type: ignore[assignment]

    def product(self, x: Tensor) -> Tensor:
        y = self.layer.packed_output(x)
        return super().product(x) if y is None else y

    def plain_output(self, x: Tensor) -> Tensor | None:
        y = self.layer.packed_output(x) if type(self.layer) is PackedCopyLinear else None
        return super().plain_output(x) if y is None else y


def can_copy(layer: nn.Module) -> bool:
    """Return True for an `nn.Linear` without hooks on a CPU, in bfloat16, or in float32 if float16 can hold its weight.

    PyTorch must have the product, too: for float32 on x86 only, for bfloat16 where the CPU is fast in it.
    """
    if type(layer) is not nn.Linear:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    if type(weight) is not nn.Parameter or not weight.is_cpu or not weight.numel() or weight.is_inference():
        return False
    if weight.dtype == torch.bfloat16:
        return fast_dtype(torch.bfloat16) is torch.bfloat16 and packs_bfloat16()
    if weight.dtype != torch.float32 or torch.backends.quantized.engine not in _ENGINES:
        return False
    return bool(weight.detach().abs().max() <= torch.finfo(torch.float16).max)


def add_packed_copies(model: nn.Module, exact: bool = False) -> int:
    """Replace every layer that `can_copy` accepts by a `PackedCopyLinear` with the same parameters, in place.

    A copy takes 2 bytes for each element of its weight. If all of them would take more than `SHARE_OF_MEMORY` of the
    free memory, none is made. Call it before the model gets adapters.

    Args:
        model: A model that will not be trained.
        exact: True for bfloat16 layers only, whose copies have the values of the weights.

    Returns:
        The number of layers that have a copy now.
    """
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    layers = {path: layer for path, layer in modules.items() if path and can_copy(layer)}
    if exact:
        layers = {path: layer for path, layer in layers.items() if layer.weight.dtype == torch.bfloat16}
    unique, room = dict.fromkeys(layers.values()), _free_memory()
    size = 2 * sum(layer.weight.numel() for layer in unique)
    if room is not None and size > SHARE_OF_MEMORY * room:
        logger.info("no packed copies: they take %.1f GiB, and %.1f GiB are free", size / 2**30, room / 2**30)
        return 0
    copies = {layer: PackedCopyLinear(layer) for layer in unique}
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, copies[layer])
    return len(copies)


def _free_memory() -> int | None:
    """Return the bytes of memory that are free now, or can be; None if the system does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
