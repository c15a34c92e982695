"""A checksum of weights in one call of compiled C (`checksum.c`): whether a value computed from them is still right.

PyTorch does not report every change of a weight. For A, B and m of a DoRA layer of 576 x 576 and rank 16, the call
takes 3 us if they are in the cache of the processor.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from peftcore.compiled.library import library

_PLAIN = (nn.Parameter, Tensor)
_is_transforming = torch._C._are_functorch_transforms_active


def checksum(first: Tensor, second: Tensor, third: Tensor) -> int | None:
    """Return a checksum of the values of three tensors, of any types and shapes.

    A change of one 32-bit word changes it for certain, a change of more words almost certainly (all but one of 2^32).

    Returns:
        64 bits; None for what is no tensor, for other devices, strides and subclasses of tensors, inside of transforms
        of functions, and where nothing could be compiled.
    """
    function = compiled()
    if (
        function is None
        or type(first) not in _PLAIN
        or type(second) not in _PLAIN
        or type(third) not in _PLAIN
        or not (first.is_cpu and second.is_cpu and third.is_cpu)
        or not (first.is_contiguous() and second.is_contiguous() and third.is_contiguous())
        or _is_transforming()
    ):
        return None
    return function(first.data_ptr(), first.nbytes, second.data_ptr(), second.nbytes, third.data_ptr(), third.nbytes)


@cache
def compiled() -> Callable[..., int] | None:
    """Return the C function; None where nothing can be compiled."""
    code = library()
    if code is None:
        return None
    function = code.checksum
    function.argtypes = [ctypes.c_void_p, ctypes.c_long] * 3
    function.restype = ctypes.c_uint64
    return function
