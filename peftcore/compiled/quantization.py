"""Quantisation to 4 bits in compiled C (`quantize_4bit.c`), with the codes and scales of bitsandbytes.

bitsandbytes has no code of its own for this on CPUs; it searches each weight's code by PyTorch's `bucketize`. For the
106 million quantised weights of SmolLM2-135M that takes 1.30 s, and this function 0.16 (2 cores of an AMD EPYC with
AVX-512).
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from peftcore.compiled.library import library, openmp

LEAST_SHARED_ELEMENTS = 2**16
"""Least number of weights that are divided among threads (count)."""
LARGEST_BLOCK = 4096
"""As in the C file."""


def quantize_4bit(weight: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise each weight to the nearest of 16 values, times the largest absolute value of its block.

    The compiled function must exist. The formula is that of QLoRA (https://arxiv.org/abs/2305.14314, section 3),
    without quantised scales.

    Args:
        weight: Tensor of n elements on the CPU: float32, bfloat16 or float16.
        values: The value of each code (16,), from -1 to 1, float32.
        block: Weights of a block, a power of 2 from 2 to 4,096. The last block may be shorter.

    Returns:
        The codes (⌈n/2⌉, 1), uint8, two in a byte, the first one in the upper half; and the scales (⌈n/block⌉,),
        float32.

    Raises:
        ValueError: blocks of another size.
    """
    function = compiled()
    assert function is not None
    if not 2 <= block <= LARGEST_BLOCK or block & (block - 1):
        raise ValueError(f"a block has 2, 4, 8, ... or {LARGEST_BLOCK:,} weights, got {block}")
    if weight.dtype is not torch.bfloat16:
        weight = weight.float()
    weight = weight.contiguous()
    order = values.argsort()
    places = values[order]
    bounds, order = (places[:-1] + places[1:]) / 2, order.to(torch.uint8)
    count = weight.numel()
    codes = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="cpu")
    scales = torch.empty(-(-count // block), dtype=torch.float32, device="cpu")
    threads = 1 if count < LEAST_SHARED_ELEMENTS else torch.get_num_threads()
    pointers = [tensor.data_ptr() for tensor in (codes, scales, weight, bounds, order)]
    function(*pointers, count, block, weight.dtype is torch.bfloat16, openmp(), threads)
    return codes, scales


@cache
def compiled() -> Callable[..., None] | None:
    """Return the C function; None where nothing can be compiled."""
    code = library()
    if code is None:
        return None
    pointer, size, function = ctypes.c_void_p, ctypes.c_long, code.quantize_4bit
    function.argtypes = [*[pointer] * 5, size, size, ctypes.c_int, pointer, ctypes.c_uint]
    function.restype = None
    return function
