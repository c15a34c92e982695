"""What goes wrong in one process of a group alone, for tests that start groups."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from quiet_training import trained
from tiny_training import adapted, trainer
from torch import Tensor

from peftcore.train import FaultPolicy

BAD_STEP = 3


def bad_loss_in_one(folder: Path) -> dict[str, Any]:
    """A run that is rolled back because of a loss of the last process."""
    model = adapted(dropout=0.2)
    made = trainer(model, folder, max_steps=5, faults=FaultPolicy(on_bad_loss="rollback"))
    real = made.compute_loss
    after: list[dict[str, Tensor]] = []

    def compute_loss(*given: Any, **named: Any) -> Any:
        after.append(trained(model))
        spoilt = dist.get_rank() == dist.get_world_size() - 1 and made.state.global_step + 1 == BAD_STEP
        return real(*given, **named) * (math.nan if spoilt else 1)

    made.compute_loss = compute_loss  # type: ignore[method-assign]
    made.train()
    return {"rollbacks": made.guard.rollbacks, "before": after, "adapter": trained(model)}


def out_of_memory_in_one(folder: Path) -> None:
    """A run whose first batch does not fit in the last process."""
    made = trainer(adapted(), folder)
    real = made.compute_loss

    def compute_loss(*given: Any, **named: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*given, **named)

    made.compute_loss = compute_loss  # type: ignore[method-assign]
    made.train()
