"""Dropout that drops the elements that `torch.nn.functional.dropout` drops, with a compact mask.

The mask is drawn by the same call of PyTorch's generator, so a seeded training run with dropout has HF PEFT's losses.
On a CPU the mask is saved for the backward pass as one bit per element, on other devices as one byte.

Shapes: n rows, i features.
"""

import torch
from torch import Tensor

from peftcore.compiled.dropout import DropoutMask


class PytorchDropout:
    """Dropout with probability p: each element is 0 with probability p, or else scaled by 1/(1 − p)."""

    def __init__(self, p: float):
        self.p = p

    @property
    def scale(self) -> float:
        """Factor of the elements that are not dropped; 0 if all are dropped."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    def draw(self, x: Tensor) -> tuple[DropoutMask, Tensor]:
        """Draw the dropout mask of x (n, i) from the generator of x's device.

        Returns:
            The mask, and the saved form from which `again` restores it.
        """
        if self.p == 1 or not x.numel():  # PyTorch draws nothing then
            keep = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        elif x.device.type == "cpu":
            # Intel's generator takes a longer seed for float64
            dtype = torch.float64 if x.dtype == torch.float64 else torch.uint8
            keep = torch.empty(x.shape, dtype=dtype, device="cpu").bernoulli_(1 - self.p).to(torch.uint8)
        else:  # a fused operation, whose numbers differ from those of `bernoulli_`
            keep = torch.native_dropout(x, self.p, True)[1].view(torch.uint8)
        mask = DropoutMask.packed(keep)
        return mask, keep if mask.bits is None else mask.bits

    def again(self, x: Tensor, saved: Tensor) -> DropoutMask:
        """Return the mask that `draw` returned for this x, given its saved form."""
        return DropoutMask(x.shape, saved) if x.device.type == "cpu" else DropoutMask(x.shape, keep=saved)
