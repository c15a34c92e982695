"""The small model of the tests that adapt one layer."""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """A layer to adapt, `target`, and a module that is not adapted.

    recomputes: whether the layer runs under activation checkpointing.
    """

    def __init__(self, target: nn.Module, recomputes: bool = False):
        super().__init__()
        self.target: Any = target
        self.untouched = nn.Identity()
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.target, x, use_reentrant=False) if self.recomputes else self.target(x)
        return self.untouched(y)
