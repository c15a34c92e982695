"""Products with a bfloat16 weight that was reordered for them, in one call of compiled C (`packed_product.c`).

It is for processors with AVX512_BF16 and without AMX. All products of SmolLM2-135M with 1, 16 and 32 tokens take 10.6,
15.3 and 24.4 ms, by oneDNN with its own order 15.0, 19.6 and 30.3, by PyTorch's `F.linear` 20.9, 30.3 and 39.7 (2
threads of an AMD EPYC).

Shapes: x (..., i), weight (o, i), bias (o,), output (..., o).
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.compiled.library import library, openmp, takes_calls

BLOCK = 32
"""Outputs that lie together, as in the C file."""
LEAST_SHARED_WORK = 2**16
"""Least number of multiplications that are divided among threads."""
_PLAIN = (Tensor, nn.Parameter)


def packed_product(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor | None] | None:
    """Return the function (x, bias) -> x Wᵀ + b with a reordered copy of a weight, without gradients.

    It returns None for other shapes, types, devices and subclasses of tensors, for no token, and where `takes_calls`
    does not hold.

    Args:
        weight: W (o, i), bfloat16 on the CPU.

    Returns:
        The function; None where nothing could be compiled, and on processors for which the code is not.
    """
    function = compiled()
    if function is None:
        return None
    outputs, inputs = weight.shape
    whole = F.pad(weight, (0, inputs % 2, 0, -outputs % BLOCK))
    pairs = whole.shape[1] // 2
    packed = whole.view(-1, BLOCK, pairs, 2).transpose(1, 2).contiguous()
    work = packed.numel()

    def product(x: Tensor, bias: Tensor | None) -> Tensor | None:
        if not (_fits(x, inputs) and x.numel() and (bias is None or _fits(bias, outputs)) and takes_calls()):
            return None
        rows = x.numel() // inputs
        y = x.new_empty(*x.shape[:-1], outputs)
        x = F.pad(x, (0, 1)) if inputs % 2 else x.contiguous()
        bias = None if bias is None else bias.contiguous()
        threads = 1 if rows * work < LEAST_SHARED_WORK else torch.get_num_threads()
        added = None if bias is None else bias.data_ptr()
        function(y.data_ptr(), x.data_ptr(), packed.data_ptr(), added, rows, pairs, outputs, openmp(), threads)
        return y

    return product


def _fits(tensor: Tensor, width: int) -> bool:
    """Return True for a plain bfloat16 tensor (..., width) on the CPU."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is torch.bfloat16
        and tensor.is_cpu
        and tensor.dim() > 0
        and tensor.shape[-1] == width
    )


@cache
def compiled() -> Callable[..., None] | None:
    """Return the C function; None where nothing can be compiled, and on other processors."""
    code = library()
    if code is None or not code.has_packed_product():
        return None
    pointer, size, function = ctypes.c_void_p, ctypes.c_long, code.packed_product
    function.argtypes = [*[pointer] * 4, *[size] * 3, pointer, ctypes.c_uint]
    function.restype = None
    return function
