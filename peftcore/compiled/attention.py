"""Attention on CPUs in one call of compiled C, without gradients.

`attention_of_one_token` (`attention.c`) is for decoding steps, `attention_of_prompts` (`attention_of_prompts.c`) for
more queries. PyTorch's kernel takes two to two and a half times as long: in a decoding step of 16 rows with 80 tokens
in the cache 240 us a layer instead of 100, and for two prompts of 256 tokens 2.6 ms instead of 1.2 (SmolLM2-135M in
bfloat16 on 2 cores of an AMD EPYC with AVX-512). It repeats the keys and values of grouped query heads, and computes
what a causal mask hides. Sums and weights are in float32 as PyTorch's are, but PyTorch rounds the weights to bfloat16
before it multiplies the values by them.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.compiled.library import library, openmp, takes_calls

LEAST_SHARED_WORK = 2**17
"""Least number of multiplications that are divided among threads (count)."""
MOST_TOKENS = 4096
"""Most keys for which prompts are computed here (count): each thread holds them, widened to float32."""
_TYPES = (torch.float32, torch.bfloat16)


class Functions(NamedTuple):
    """The C functions."""

    one_token: Callable[..., int]
    prompts: Callable[..., int]


def attention_of_one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
    """Return softmax(s·q kᵀ) v for one query token in each row, without gradients, if the compiled function fits.

    Each key head belongs to H / h query heads that follow each other. A row without visible tokens gets zeros.

    Args:
        q: Queries (B, H, 1, d), float32 or bfloat16.
        k: Keys (B, h, S, d) of q's type.
        v: Values (B, h, S, d) of q's type.
        mask: (B or 1, 1, 1, S), False for tokens that are hidden; None if all are visible.
        scaling: s.

    Returns:
        (B, 1, H, d) in new memory. None for other shapes, types, devices and subclasses of tensors, for masks for each
        head or that are added, with gradients, inside of traces, and where nothing could be compiled.

    Raises:
        MemoryError: There is no memory for the weights.
    """
    functions = compiled()
    if functions is None or q.dim() != 4 or q.shape[2] != 1 or not _fit(q, k, v, mask):
        return None
    rows, heads, _, width = q.shape
    _, key_heads, tokens, _ = k.shape
    out = torch.empty(rows, 1, heads, width, dtype=q.dtype)
    sizes = _longs(rows, key_heads, heads // key_heads, tokens, width)
    by_row = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    strides = _longs(q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], by_row)
    pointers = out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), None if mask is None else mask.data_ptr()
    threads = 1 if rows * heads * tokens * width < LEAST_SHARED_WORK else torch.get_num_threads()
    if not functions.one_token(*pointers, sizes, strides, scaling, q.dtype is torch.bfloat16, openmp(), threads):
        raise MemoryError(f"no memory for the attention weights of {tokens} tokens; free some memory")
    return out


def attention_of_prompts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scaling: float
) -> Tensor | None:
    """Return softmax(s·q kᵀ) v for any number of query tokens, without gradients, if the compiled function fits.

    Each key head belongs to H / h query heads that follow each other. A query without visible tokens gets zeros. The
    output of a query does not depend on the other queries, nor on the number of threads.

    Args:
        q: Queries (B, H, T, d), float32 or bfloat16.
        k: Keys (B, h, S, d) of q's type.
        v: Values (B, h, S, d) of q's type.
        mask: (B or 1, 1, T, S), False for tokens that are hidden; None if all are visible.
        is_causal: True if query t sees tokens 0 to t only; without a mask, and with T at most S.
        scaling: s.

    Returns:
        (B, T, H, d) in new memory. None for more than `MOST_TOKENS` tokens, and whenever `attention_of_one_token`
        returns None.

    Raises:
        MemoryError: There is no memory for keys, values and weights.
    """
    functions = compiled()
    if functions is None or q.dim() != 4 or not _fit(q, k, v, mask):
        return None
    rows, heads, queries, width = q.shape
    _, key_heads, tokens, _ = k.shape
    if not queries or tokens > MOST_TOKENS or (is_causal and (mask is not None or queries > tokens)):
        return None
    out = torch.empty(rows, queries, heads, width, dtype=q.dtype)
    sizes = _longs(rows, key_heads, heads // key_heads, queries, tokens, width)
    of_mask = (0, 0) if mask is None else (0 if len(mask) == 1 else mask.stride(0), mask.stride(2))
    strides = _longs(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_mask)
    pointers = out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), None if mask is None else mask.data_ptr()
    threads = 1 if rows * heads * queries * tokens * width < LEAST_SHARED_WORK else torch.get_num_threads()
    flags = is_causal, q.dtype is torch.bfloat16
    if not functions.prompts(*pointers, sizes, strides, scaling, *flags, openmp(), threads):
        raise MemoryError(f"no memory for the attention of {queries} queries and {tokens} tokens; free some memory")
    return out


def _fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    dtype, shape = q.dtype, k.shape
    if dtype not in _TYPES or not takes_calls():
        return False
    for one in (q, k, v):
        if type(one) is not Tensor or one.dtype is not dtype or not one.is_cpu or one.dim() != 4 or one.stride(3) != 1:
            return False
    rows, heads, _, width = q.shape
    return (
        v.shape == shape
        and shape[0] == rows
        and shape[3] == width
        and 0 not in shape
        and not heads % shape[1]
        and not width % vector_width()
        and (mask is None or _fits(mask, q, k))
    )


def _fits(mask: Tensor, q: Tensor, k: Tensor) -> bool:
    return (
        type(mask) is Tensor
        and mask.dtype is torch.bool
        and mask.is_cpu
        and mask.dim() == 4
        and mask.shape[0] in (1, len(q))
        and mask.shape[1:] == (1, q.shape[2], k.shape[2])
        and mask.stride(3) == 1
    )


@cache
def _longs_of(count: int) -> Any:
    return ctypes.c_long * count


def _longs(*values: int) -> Any:
    return _longs_of(len(values))(*values)


@cache
def compiled() -> Functions | None:
    """Return the C functions; None where nothing can be compiled."""
    code = library()
    if code is None:
        return None
    pointer, flag = ctypes.c_void_p, ctypes.c_int
    one_token, prompts = code.attend_one_token, code.attend_prompts
    one_token.argtypes = [*[pointer] * 7, ctypes.c_float, flag, pointer, ctypes.c_uint]
    prompts.argtypes = [*[pointer] * 7, ctypes.c_float, flag, flag, pointer, ctypes.c_uint]
    return Functions(one_token, prompts)


@cache
def vector_width() -> int:
    """Return how many elements a vector of the compiled code has (count)."""
    code = library()
    assert code is not None
    return code.vector_width()
