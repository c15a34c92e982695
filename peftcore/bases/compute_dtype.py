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
LEAST_PRODUCTS, MOST_PRODUCTS = 5, 15
"""Products in each type (count) before a type counts as fast, and as slow; other work on the machine delays some."""


def fast_dtype(dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """Return `dtype`, or float32 on a CPU that multiplies matrices of `dtype` several times more slowly.

    The first call for a 16-bit type measures small products, in about 0.4 s at most.

    Args:
        dtype: the preferred type, such as that of a checkpoint.
        device: where the model computes.
    """
    if torch.device(device).type != "cpu" or not dtype.is_floating_point or dtype.itemsize != 2:
        return dtype
    return torch.float32 if _is_slow(dtype) else dtype


@lru_cache
def _is_slow(dtype: torch.dtype) -> bool:
    """Return True if not even the shortest product in `dtype` comes near the shortest one in float32."""
    narrow = wide = float("inf")
    for number in range(1, MOST_PRODUCTS + 1):  # the first products of a process also start threads
        narrow, wide = min(narrow, _product_seconds(dtype)), min(wide, _product_seconds(torch.float32))
        if number >= LEAST_PRODUCTS and narrow <= SLOWER * wide:
            return False
    logger.info("this CPU takes %.0f times as long for products in %s, so float32 is used", narrow / wide, dtype)
    return True


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the time of the product that a backward pass needs: no matrix transposed."""
    with torch.inference_mode():
        one = torch.ones(SIZE, SIZE, dtype=dtype, device="cpu")  # the default device may be another one
        start = time.perf_counter()
        torch.mm(one, one)
        return time.perf_counter() - start
