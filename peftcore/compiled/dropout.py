"""Dropout masks as bits, in compiled C (`dropout.c`) or by NumPy and PyTorch; both give the same bits.

One training step of SmolLM2-135M with 1,024 tokens draws 100 million elements, and applies each three times. For 1024 x
576 elements in bfloat16, C takes 80 and 26 us, NumPy and PyTorch 170 and 90 (2 cores of an AMD EPYC with AVX-512).

Shapes: n rows, i features.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peftcore.compiled.library import library, openmp, takes_calls

LEAST_SHARED_ELEMENTS = 2**16
"""Least number of elements that are divided among threads (count)."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""{bytes per element: integer type}. Multiplying the bits by 0 or 1 is exact, and drops infinities and NaN too."""


class Functions(NamedTuple):
    """The C functions."""

    draw: Callable[..., None]
    apply: Callable[..., None]


class DropoutMask:
    """The elements of a tensor (n, i) that dropout keeps.

    Args:
        shape: (n, i).
        bits: One bit per element in bytes, the highest bit first, as NumPy's `packbits` makes them; on a CPU only.
        keep: (n, i), uint8: 1 for elements that are kept, 0 for others. Without bits it is required.
    """

    def __init__(self, shape: torch.Size, bits: Tensor | None = None, keep: Tensor | None = None):
        self.bits = bits
        self._shape, self._keep = shape, keep

    @classmethod
    def packed(cls, keep: Tensor) -> "DropoutMask":
        """Return the mask with these bytes (n, i) and, on a CPU, with bits."""
        bits = torch.from_numpy(np.packbits(keep.numpy())) if keep.device.type == "cpu" else None
        return cls(keep.shape, bits, keep)

    @property
    def keep(self) -> Tensor:
        """The mask as bytes (n, i): 1 for elements that are kept, 0 for others."""
        if self._keep is None:
            assert self.bits is not None
            self._keep = torch.from_numpy(np.unpackbits(self.bits.numpy(), count=self._shape.numel())).view(self._shape)
        return self._keep

    def apply(self, x: Tensor) -> Tensor:
        """Return x (n, i) with 0 for dropped elements, not scaled, in new memory; differentiable in x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return x.masked_fill(self.keep == 0, 0)
        x = x.contiguous()
        out = torch.empty_like(x)
        if not self._applied(out, x):
            kind = _INTEGERS[x.element_size()]
            torch.mul(x.view(kind), self.keep, out=out.view(kind))
        return out

    def apply_(self, x: Tensor) -> Tensor:
        """Set dropped elements of a contiguous x (n, i) to 0, and return x."""
        if not self._applied(x, x):
            x.view(_INTEGERS[x.element_size()]).mul_(self.keep)
        return x

    def _applied(self, out: Tensor, x: Tensor) -> bool:
        """Write x, masked, into `out` by the compiled function; return False if it does not fit."""
        functions, size, count = compiled(), x.element_size(), x.numel()
        if functions is None or self.bits is None or size not in (2, 4) or type(x) is not Tensor or not takes_calls():
            return False
        threads = 1 if count < LEAST_SHARED_ELEMENTS else torch.get_num_threads()
        functions.apply(out.data_ptr(), x.data_ptr(), self.bits.data_ptr(), count, size, openmp(), threads)
        return True


def draw_bits(seed: int, threshold: int, count: int) -> Tensor:
    """Return the bits of a mask that keeps each element whose byte of NumPy's `SFC64(seed)` is at least the threshold.

    Args:
        seed: of the generator.
        threshold: 0 to 256.
        count: elements of the mask; bits behind the last one are 0.
    """
    generator, functions = np.random.SFC64(seed), compiled()
    if functions is None:
        random = generator.random_raw(-(-count // 8)).view(np.uint8)[:count]
        return torch.from_numpy(np.packbits(random >= threshold))
    state, bits = generator.state["state"]["state"], torch.empty(-(-count // 8), dtype=torch.uint8, device="cpu")
    functions.draw(bits.data_ptr(), state.ctypes.data, threshold, count)
    return bits


@cache
def compiled() -> Functions | None:
    """Return the C functions; None where nothing can be compiled."""
    code = library()
    if code is None:
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    draw, apply = code.draw_dropout_mask, code.apply_dropout_mask
    draw.argtypes = [pointer, pointer, number, size]
    apply.argtypes = [*[pointer] * 3, size, number, pointer, ctypes.c_uint]
    draw.restype = apply.restype = None
    return Functions(draw, apply)
