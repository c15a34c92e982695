"""Dropout with a compact mask: between forward and backward pass the mask is one bit per element, or only a seed.

An element is dropped if its random byte is below a threshold t. If p·256 is not an integer, each call rounds it up or
down at random, so that the drop probability of every element is p. The scale is 1/(1 − t/256), so that the mean of the
output is the input.

On a CPU the bytes are those of NumPy's SFC64, which costs a twentieth of PyTorch's Bernoulli numbers. The mask is saved
as one bit per element. On other devices PyTorch's generator of that device draws the mask again from the seed.

Shapes: n rows, i features.
"""

import torch
from torch import Tensor

from peftcore.compiled.dropout import DropoutMask, draw_bits

_COIN = 2**15


class Dropout:
    """One draw of a dropout mask with probability p.

    The seed is drawn from PyTorch's default generator: `manual_seed` and gradient checkpointing reproduce the mask.
    """

    def __init__(self, p: float):
        drawn = int(torch.empty((), dtype=torch.int64).random_().item())
        coin, self.seed = drawn % _COIN, drawn // _COIN
        least = int(p * 256)
        self.threshold = least + (coin < round((p * 256 - least) * _COIN))
        """Bytes below the threshold (0 to 256) drop their element."""

    @property
    def scale(self) -> float:
        """Factor of the elements that are not dropped; 0 if all are dropped."""
        return 256 / (256 - self.threshold) if self.threshold < 256 else 0.0

    def draw(self, x: Tensor) -> tuple[DropoutMask, Tensor | None]:
        """Draw the dropout mask of x (n, i).

        Returns:
            The mask, and the bits from which `again` restores it; None on devices other than the CPU, where `again`
            draws from the seed.
        """
        if x.device.type != "cpu":
            return self.again(x, None), None
        bits = draw_bits(self.seed, self.threshold, x.numel())
        return DropoutMask(x.shape, bits), bits

    def again(self, x: Tensor, bits: Tensor | None) -> DropoutMask:
        """Return the mask that `draw` returned for this x."""
        if bits is not None:
            return DropoutMask(x.shape, bits)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        random = torch.randint(256, x.shape, dtype=torch.int16, device=x.device, generator=generator)
        return DropoutMask(x.shape, keep=(random >= self.threshold).to(torch.uint8))
