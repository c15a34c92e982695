"""The type in which a device multiplies matrices at full speed.

CPUs without AVX-512 have no kernels for 16 bits. PyTorch then takes 6 to 10 times as long for a product in bfloat16 as
in float32, and 50 times in a backward pass (2 cores of an AMD EPYC limited to AVX2, torch 2.13).
"""

import logging
import time
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

SLOWER = 4.0
"""How many times as long a product must take for float32 to be used. Where 16 bits have kernels, it is at most 1.5."""
SIZE = 256
"""Rows and columns of the matrices that are multiplied (count)."""
REPEATS = 5


def fast_dtype(dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """Return `dtype`, or float32 on a CPU that multiplies matrices of `dtype` several times more slowly.

    The first call for a 16-bit type measures a small product, in 0.1 s at most.

    Args:
        dtype: the preferred type, such as that of a checkpoint.
        device: where the model computes.
    """
    if torch.device(device).type != "cpu" or not dtype.is_floating_point or dtype.itemsize != 2:
        return dtype
    return torch.float32 if _is_slow(dtype) else dtype


@lru_cache
def _is_slow(dtype: torch.dtype) -> bool:
    times = _product_seconds(dtype) / _product_seconds(torch.float32)
    if times > SLOWER:
        logger.info("this CPU takes %.0f times as long for products in %s, so float32 is used", times, dtype)
    return times > SLOWER


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the shortest of several times of the product that a backward pass needs: no matrix transposed."""
    with torch.inference_mode():
        one = torch.ones(SIZE, SIZE, dtype=dtype)
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            torch.mm(one, one)
            seconds.append(time.perf_counter() - start)
    return min(seconds)
