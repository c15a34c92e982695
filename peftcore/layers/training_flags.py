"""Saving and restoring the training mode of each module: adapters may train on a base in evaluation mode."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def training_flags_restored(model: nn.Module) -> Iterator[None]:
    """Restore each module's training mode at the end of the context, whatever `train` and `eval` changed inside."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
