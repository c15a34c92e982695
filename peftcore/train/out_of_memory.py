"""A micro-batch that does not fit into memory, in parts of fewer rows whose gradients add up to its own.

    ∇ Σ_b L_b / N = Σ_parts ∇ Σ_{b in part} L_b / N,    N: supervised tokens of the whole optimiser step

Exact, because N is that of the whole step. Dropout draws other numbers for parts than for the whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

_foreach_add: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a device or of the host, had nothing left to give.

    A CPU's says so only where the process has a limit of its own (ulimit -v); a system that is out of memory kills.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def rows_of(inputs: Mapping[str, Any]) -> int | None:
    """Rows (count) that a batch can be split into; None if not all of its tensors lie along the same rows."""
    counts = {len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
    return counts.pop() if len(counts) == 1 else None


def parts_of(inputs: Mapping[str, Any], rows: int) -> list[dict[str, Any]]:
    """The batch in parts of at most `rows` rows; what is no tensor of rows goes to each part as it is."""
    count = rows_of(inputs)
    if count is None or count <= rows:
        return [dict(inputs)]
    return [
        {
            name: value[first : first + rows] if isinstance(value, Tensor) and value.dim() else value
            for name, value in inputs.items()
        }
        for first in range(0, count, rows)
    ]


@contextmanager
def gradients_apart(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients start from none. At the end they are added to what was there; after an error they are dropped.

    The sums are those of accumulation in place, bit for bit, and nothing is copied.
    """
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, grad in before:
            parameter.grad = grad
        raise
    added: list[tuple[Tensor, Tensor]] = []
    for parameter, grad in before:
        if grad is not None and parameter.grad is not None:
            added.append((grad, parameter.grad))
        if grad is not None:
            parameter.grad = grad
    if added:
        _foreach_add(*map(list, zip(*added, strict=True)))
