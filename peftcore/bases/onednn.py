"""Float32 products of decoding steps by oneDNN instead of MKL, on CPUs made by AMD.

PyTorch contains both libraries, and multiplies float32 matrices with Intel's MKL. On AMD's CPUs, MKL is slow for few
tokens and several threads (`benchmarks.float32_products`). PyTorch has no switch between the two for float32, but an
operation of oneDNN that `torch.compile` uses.

The two add in different orders, so outputs differ by the rounding of float32: oneDNN's is 4e-7 to 5e-7 of an output,
MKL's 2.5e-7. Longer inputs are left to MKL, so an adapter that changes nothing leaves the model's outputs for a text as
they are, to the bit.
"""

import logging
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

LEAST_ELEMENTS = 2**19
"""Smallest weight (count of elements) that oneDNN multiplies.

A call of oneDNN takes 9 us more than `F.linear` if it follows another one. In a model whose other layers multiply by
MKL, weights of 192 or 576 outputs and 576 inputs took 15 to 60 us more.
"""
MOST_ROWS = 64
"""Largest number of rows (count). For each number of rows and each shape of weight, oneDNN keeps a kernel of about 0.5
MiB, but not more than 1,024 kernels."""
_PLAIN = (Tensor, nn.Parameter)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b like `F.linear`; for one token in each row, without gradients, by oneDNN where that is faster.

    Args:
        x: (..., i); a decoding step is (rows, 1, i).
        weight: W (o, i), of any strides.
        bias: b (o,), of the type of W; None for no bias.

    Returns:
        (..., o) in new memory.
    """
    if _onednn_is_faster(x, weight):
        return product(x, weight, bias)
    return F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b in float32 by oneDNN, without a gradient; the arguments are those of `linear`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.dtype is torch.float32
        and x.dtype is torch.float32
        and weight.numel() >= LEAST_ELEMENTS
        and x.dim() == 3
        and x.shape[1] == 1
        and 0 < len(x) <= MOST_ROWS
        and not torch.is_grad_enabled()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.is_cpu
        and weight.is_cpu
        and not torch._C._is_any_autocast_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_mkldnn_enabled()
        and mkl_is_slow()
    )


@cache
def mkl_is_slow() -> bool:
    """Return True on a CPU made by AMD, if PyTorch contains MKL and oneDNN."""
    return "AuthenticAMD" in _cpu_maker() and torch.backends.mkl.is_available() and is_usable()


def _cpu_maker() -> str:
    """Return a text that contains the maker's identification, such as AuthenticAMD or GenuineIntel."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        return next((line for line in lines if line.startswith("vendor_id")), "")


@cache
def is_usable() -> bool:
    """Return True if PyTorch has oneDNN's operation. It is not public, so a version of PyTorch may change it."""
    one = torch.eye(2, dtype=torch.float32, device="cpu")
    try:
        return torch.equal(product(one, one), one)
    except (AttributeError, TypeError, RuntimeError) as error:
        logger.info("oneDNN's product cannot be used: %s", error)
        return False
