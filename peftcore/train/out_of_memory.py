"""Out-of-memory recovery: a micro-batch is split into parts of fewer rows. The sum of the parts' gradients is exact.

    ∇ Σ_b L_b / N = Σ_parts ∇ Σ_{b in part} L_b / N,    N: items of the whole optimiser step (tokens or examples)

The gradients are exact, because N belongs to the whole step. Dropout draws other numbers for parts than for the whole.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from peftcore.errors import TrainingError

_LOG = logging.getLogger(__name__)
_foreach_add: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]

ComputeGradients = Callable[[nn.Module, dict[str, Any], Any], Tensor]
"""Trainer's `training_step`: (model, inputs, num_items) -> detached loss, a scalar."""


class BatchSplitter:
    """Forward and backward passes of one run, in parts as soon as a batch has not fitted into memory."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.rows_at_once: int | None = None
        """Rows (count) per forward pass that fit into memory. None: every batch has fitted so far."""

    def forward_backward(
        self, compute: ComputeGradients, model: nn.Module, inputs: dict[str, Any], num_items: Any
    ) -> Tensor:
        """Compute the gradients of one micro-batch, and return its detached loss.

        Raises:
            TrainingError: The batch does not fit, and cannot or may not be split further.
        """
        terms = len(self.trainer.regularizer.values)
        while True:
            try:
                with fresh_gradients(self._trained_parameters() if self._can_split(num_items) else ()):
                    return self._sum_of_parts(compute, model, inputs, num_items)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).partition("\n")[0] or type(error).__name__
            # outside of the except block the traceback no longer holds the failed pass's tensors
            del self.trainer.regularizer.values[terms:]
            clear_device_cache(garbage_collection=True)
            self._lower_rows(inputs, num_items, message)

    def _sum_of_parts(
        self, compute: ComputeGradients, model: nn.Module, inputs: dict[str, Any], num_items: Any
    ) -> Tensor:
        rows, objective = self.rows_at_once, self.trainer.training_objective
        parts = [inputs] if rows is None else objective.parts(inputs, rows)
        accelerator = self.trainer.accelerator
        gradient_state, sync = accelerator.gradient_state, accelerator.sync_gradients
        total: Tensor | None = None
        try:
            for number, part in enumerate(parts, 1):
                gradient_state._set_sync_gradients(sync and number == len(parts))  # adds the regulariser once
                loss = compute(model, part, num_items)
                total = loss if total is None else total + loss
        finally:
            gradient_state._set_sync_gradients(sync)
        assert total is not None
        return total

    def _lower_rows(self, inputs: Mapping[str, Any], num_items: Any, message: str) -> None:
        """Halve the rows per forward pass, or raise TrainingError if that is not possible."""
        trainer = self.trainer
        rows = row_count(inputs)
        if rows is not None and self.rows_at_once is not None:
            rows = min(rows, self.rows_at_once)
        if rows == 1:
            raise TrainingError(
                "out of memory with a single row: shorten the rows (or the packs), checkpoint activations "
                f"(activation_checkpointing=True), or quantise the base ({message})"
            )
        fewer = "lower per_device_train_batch_size, and raise gradient_accumulation_steps by the same factor"
        if trainer.faults.on_out_of_memory == "stop":
            raise TrainingError(f"out of memory: {fewer}, or set on_out_of_memory='split' ({message})")
        if trainer.accelerator.num_processes > 1:
            raise TrainingError(
                f"out of memory on one of several processes, which cannot split batches independently: {fewer}"
            )
        if rows is None or not self._can_split(num_items):
            raise TrainingError(
                "out of memory, and this batch cannot be split (its loss is a mean, or the first dimension of its "
                f"tensors is not the rows): {fewer} ({message})"
            )
        self.rows_at_once = rows // 2
        trainer.guard.counts["micro_batch_splits"] += 1
        factor = -(-trainer.args.per_device_train_batch_size // self.rows_at_once)
        _LOG.warning(
            "out of memory with %d rows: from now on a forward pass has %d rows, with the same gradients; to start "
            "with that size, divide per_device_train_batch_size by %d and multiply gradient_accumulation_steps by %d "
            "(%s)",
            *(rows, self.rows_at_once, factor, factor, message),
        )

    def _can_split(self, num_items: Any) -> bool:
        """Return True if the losses of a batch's parts add up to the loss of the batch."""
        trainer = self.trainer
        if trainer.faults.on_out_of_memory == "stop" or num_items is None or trainer.accelerator.num_processes > 1:
            return False
        return trainer.compute_loss_func is not None or trainer.training_objective.is_sum_over_items()

    def _trained_parameters(self) -> list[nn.Parameter]:
        if self.trainer.optimizer is None:
            return [parameter for parameter in self.trainer.adapted_model.parameters() if parameter.requires_grad]
        optimizer = cast(torch.optim.Optimizer, self.trainer.optimizer)
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocator, of a device or of the CPU, ran out of memory.

    A CPU allocator fails only under a limit of its process (`ulimit -v`). Without one, the system kills the process.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def row_count(inputs: Mapping[str, Any]) -> int | None:
    """Return the rows (count) of a batch. None if its tensors differ in the size of their first dimension."""
    counts = {len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
    return counts.pop() if len(counts) == 1 else None


def split_rows(inputs: Mapping[str, Any], rows: int) -> list[dict[str, Any]]:
    """Return a batch in parts of at most `rows` rows; scalars and values that are no tensors go to every part."""
    count = row_count(inputs)
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
def fresh_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Start from no gradients inside; on exit add them to the earlier ones, and after an error drop them.

    The sums equal those of accumulation in place, bit for bit, and no gradient is copied.
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
