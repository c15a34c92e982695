"""Low-rank products for few tokens in one call of compiled C (`low_rank.c`).

`add_low_rank` is for one adapter, `add_low_rank_by_row` for rows with different adapters. The latter uses all threads;
so does the former for many rows. For few rows, starting the threads takes as long as they save.

A decoding step reads the weights of the whole model, which drives everything else out of the processor's caches. So
the four operations of a low-rank branch (cast, two products, addition) cost far more than their arithmetic: 50 to 65 us
a layer on a CPU, where one call of compiled code takes 14. PyTorch has no such operation. For the same reason, what can
be looked up once is packed for C once, as `Factors` or as a `RowTable`, and C reads A's and B's values of the time of
each call.

Without compiled code (`peftcore.compiled.library`), the layers use PyTorch's operations. The numbers are the same but
for the rounding of float32.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.compiled.library import library, openmp

MOST_WORK = 2**26
"""Largest number of multiplications of one call (count). Where calls have one thread, they have this many divided by
PyTorch's threads, because PyTorch's own products use them all, but at least `LEAST_SHARED_WORK`."""
MOST_WORK_BY_ROW = 2**27
"""The same for rows with different adapters, if all threads work. Beyond it, PyTorch's products by adapter take as long
or less (`LOG.md` of the benchmarks)."""
LEAST_SHARED_WORK = 2**18
"""Least number of multiplications of one adapter that are divided among threads (count): 16 rows of 576 inputs and
outputs with rank 16. Two threads save a quarter of their time, and nothing of that of 8 rows (`LOG.md` of the
benchmarks)."""
IS_BFLOAT16 = {torch.float32: False, torch.bfloat16: True}
"""{type of x and y: what C is told}. A and B have the same type, or float32."""
_PLAIN = (Tensor, nn.Parameter)
_dispatch_stack_length = torch._C._len_torch_dispatch_stack
_ROW = struct.Struct("@PPlf0P")
"""`struct low_rank` of low_rank.c: addresses of A and B, r, s."""
_HEAD = struct.Struct("@llixxxx")
"""`struct adapters` of low_rank.c without the rows: i, o, whether A and B are bfloat16."""
_NO_ADAPTER = bytes(_ROW.size)


@dataclass(slots=True, eq=False)
class Factors:
    """s, A (r, i) and B (o, r) of one adapter, packed for C."""

    a: Tensor
    b: Tensor
    shapes: tuple[torch.Size, torch.Size]
    addresses: tuple[int, int]
    dtype: torch.dtype
    """Type of A and B."""
    inputs: int
    """i (count)"""
    outputs: int
    """o (count)"""
    r: int
    shared_from: int
    """Least number of tokens that are divided among threads (count)."""
    row: bytes
    """The adapter's `struct low_rank`."""
    packed: bytes
    """The `struct adapters` of this one adapter."""
    memory: tuple[Any, Any]
    """The memory of A and B, which is kept so that C never reads memory of something else."""


def factors_of(a: Tensor, b: Tensor, scaling: Any) -> Factors | None:
    """Return an adapter for C; None unless A and B are contiguous tensors on the CPU whose types and sizes fit.

    Args:
        a: A (r, i) in float32 or bfloat16.
        b: B (o, r) of A's type.
        scaling: s.
    """
    for one in (a, b):
        if type(one) not in _PLAIN or one.dtype not in IS_BFLOAT16 or not one.is_cpu or not one.is_contiguous():
            return None
    if a.dtype is not b.dtype or a.dim() != 2 or b.dim() != 2 or b.shape[1] != len(a) or type(scaling) is not float:
        return None
    (r, inputs), outputs = a.shape, len(b)
    if not (inputs and outputs):
        return None
    addresses = a.data_ptr(), b.data_ptr()
    row = _ROW.pack(*addresses, r, scaling)
    return Factors(
        a,
        b,
        (a.shape, b.shape),
        addresses,
        a.dtype,
        inputs,
        outputs,
        r,
        shared_from=-(-LEAST_SHARED_WORK // (r * (inputs + outputs) or 1)),
        row=row,
        packed=_HEAD.pack(inputs, outputs, IS_BFLOAT16[a.dtype]) + row,
        memory=(a.untyped_storage(), b.untyped_storage()),
    )


def add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, factors: Factors, diagonal: Tensor | None, gain: Tensor | None
) -> bool:
    """Change y to g∘(y + s·BΛA x) in place, without gradients, if the compiled function fits.

    Args:
        y: (..., o) in new memory, float32 or bfloat16.
        x: (..., i) of y's type.
        a: A (r, i) in float32 or y's type.
        b: B (o, r) of A's type.
        factors: A, B and s, packed for C earlier.
        diagonal: Λ, r elements of A's type or in float32; None for ones.
        gain: g, o elements of A's type or in float32; None for ones.

    Returns:
        True if y is changed. False, with y as it was, if A or B is another tensor than the packed one or lies in other
        memory, for much work, for other types, devices, strides or subclasses of tensors, inside of a
        `TorchDispatchMode`, and where nothing could be compiled.

    Raises:
        MemoryError: There is no memory for intermediate values. Some rows of y may be changed.
    """
    function, dtype, own_dtype, size = compiled(), x.dtype, factors.dtype, x.numel()
    rows = size // factors.inputs
    if (
        function is None
        or dtype not in IS_BFLOAT16
        or y.dtype is not dtype
        or not (own_dtype is dtype or own_dtype is torch.float32)
        or type(x) is not Tensor
        or type(y) is not Tensor
        or not (x.is_cpu and y.is_cpu and x.is_contiguous() and y.is_contiguous())
        or size != rows * factors.inputs
        or y.numel() != rows * factors.outputs
        or a is not factors.a
        or b is not factors.b
        or (a.data_ptr(), b.data_ptr()) != factors.addresses
        or (a.shape, b.shape) != factors.shapes
        or not (a.dtype is own_dtype is b.dtype and a.is_contiguous() and b.is_contiguous())
        or _dispatch_stack_length()
    ):
        return False
    threads, e, g = 1, None, None
    if rows >= factors.shared_from:
        if not fits_work(x, factors):
            return False
        threads = torch.get_num_threads()
    if diagonal is not None:
        diagonal = float32_vector(diagonal, factors.r, own_dtype)
        if diagonal is None:
            return False
        e = diagonal.data_ptr()
    if gain is not None:
        gain = float32_vector(gain, factors.outputs, own_dtype)
        if gain is None:
            return False
        g = gain.data_ptr()
    is_bfloat16 = dtype is torch.bfloat16
    if not function(y.data_ptr(), x.data_ptr(), factors.packed, rows, rows, is_bfloat16, e, g, openmp(), threads):
        raise _no_memory(rows)
    return True


def fits_work(x: Tensor, factors: Factors) -> bool:
    """Return True if x (..., i) is not too long for one call."""
    return x.numel() // factors.inputs * factors.r * (factors.inputs + factors.outputs) <= _most_work()


def float32_vector(tensor: Tensor, length: int, dtype: torch.dtype) -> Tensor | None:
    """Return a tensor of `dtype` or float32 in float32; None if C cannot read it, or for another number of elements."""
    if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.numel() != length or not tensor.is_contiguous():
        return None
    if tensor.dtype is torch.float32:
        return tensor
    return tensor.float() if tensor.dtype is dtype else None


class RowTable(NamedTuple):
    """The factors of each row of a batch, for any number of tokens in a row."""

    inputs: int
    """i of all factors (count)."""
    outputs: int
    """o of all factors (count)."""
    dtype: torch.dtype
    """Type of all factors."""
    ranks: int
    """Sum of the rows' r (count)."""
    rows: int
    packed: bytes
    """The `struct adapters` of the rows."""
    factors: list[Factors]
    """The factors of all rows with an adapter, which keep their memory."""


def row_table(rows: Sequence[Factors | None]) -> RowTable | None:
    """Return the table for rows with one adapter or none.

    Args:
        rows: for each row, its adapter's factors; None for the base alone.

    Returns:
        The table; None if no row has an adapter, or if the factors' sizes or types differ.
    """
    factors = [one for one in rows if one is not None]
    kinds = {(one.inputs, one.outputs, one.dtype) for one in factors}
    if len(kinds) != 1:
        return None
    inputs, outputs, dtype = kinds.pop()
    head = _HEAD.pack(inputs, outputs, IS_BFLOAT16[dtype])
    packed = head + b"".join([_NO_ADAPTER if one is None else one.row for one in rows])
    return RowTable(inputs, outputs, dtype, sum([one.r for one in factors]), len(rows), packed, factors)


def fits_by_row(x: Tensor, table: RowTable) -> bool:
    """Return True if `add_low_rank_by_row` is for this input; it need not be for much work.

    Args:
        x: (rows, ..., i).
        table: the table of the rows.
    """
    rows, inputs = table.rows, table.inputs
    if (
        not computes(x.dtype)
        or not (table.dtype is torch.float32 or table.dtype is x.dtype)
        or type(x) is not Tensor
        or not (x.is_cpu and x.is_contiguous() and x.numel())
        or x.shape[-1] != inputs
        or x.numel() % (rows * inputs)
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    each = x.numel() // (rows * inputs)
    return each * table.ranks * (inputs + table.outputs) <= (MOST_WORK_BY_ROW if openmp() else _most_work())


def add_low_rank_by_row(y: Tensor, x: Tensor, table: RowTable) -> bool:
    """Add s·B A x to y in place, each row with the factors that the table names; see `add_low_rank`.

    Args:
        y: (rows, ..., o) in new memory, as many rows as the table has, each with as many tokens.
        x: (rows, ..., i) of y's type, which `fits_by_row`.
        table: the table of the rows.
    """
    tokens, outputs = x.numel() // table.inputs, table.outputs
    if (
        not fits_by_row(x, table)
        or y.dtype is not x.dtype
        or type(y) is not Tensor
        or not (y.is_cpu and y.is_contiguous())
        or y.shape[-1] != outputs
        or y.numel() != tokens * outputs
    ):
        return False
    function = compiled()
    if function is None:
        return False
    each, threads = tokens // table.rows, torch.get_num_threads()
    call = y.data_ptr(), x.data_ptr(), table.packed, tokens, each, IS_BFLOAT16[x.dtype]
    if not function(*call, None, None, openmp(), threads):
        raise _no_memory(tokens)
    return True


def _most_work() -> int:
    """Return the largest number of multiplications of a call."""
    return MOST_WORK if openmp() else max(LEAST_SHARED_WORK, MOST_WORK // torch.get_num_threads())


def _no_memory(rows: int) -> MemoryError:
    return MemoryError(f"no memory for the intermediate values of a low-rank product of {rows} rows; free some memory")


def computes(dtype: torch.dtype) -> bool:
    """Return True if there is compiled code for x and y of this type."""
    return dtype in IS_BFLOAT16 and compiled() is not None


@cache
def compiled() -> Callable[..., int] | None:
    """Return the C function; None where nothing can be compiled."""
    code = library()
    if code is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_long
    function = code.add_low_rank_to_rows
    function.argtypes = [pointer, pointer, ctypes.c_char_p, count, count, ctypes.c_int, pointer, pointer, pointer]
    function.argtypes += [ctypes.c_uint]
    return function
