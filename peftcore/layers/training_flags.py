"""Whether modules are in training mode, kept module by module: adapters may train on a base in evaluation mode."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def training_flags_restored(model: nn.Module) -> Iterator[None]:
    """Context in which `train` and `eval` may be called; afterwards each module is in the mode it was in before."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
