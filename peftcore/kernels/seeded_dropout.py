"""Dropout whose mask is made twice or kept as bits, never as numbers: nothing of the input's size stays in memory.

An element is dropped where its random byte is below a threshold t. Where p·256 is no whole number, each call takes the
one below or above by a coin, so that every element's chance is p, and scales by 1/(1 − t/256), so that its mean is the
input. On a CPU the bytes come from numpy's SFC64, whose raw words cost a twentieth of PyTorch's Bernoulli numbers, and
the mask is kept as one bit an element; elsewhere PyTorch's generator of that device makes it again from the seed.

Shapes: n rows, i features.
"""

import numpy as np
import torch
from torch import Tensor

_COIN = 2**15
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of an element's size: its bits times 0 or 1 are exact, and infinities and NaN are dropped too."""


class Dropout:
    """One drawing of a mask, for as many rows as the input has.

    The seed is out of PyTorch's default generator, so that `manual_seed` and checkpointing's state reach it.
    """

    def __init__(self, p: float):
        drawn = int(torch.empty((), dtype=torch.int64).random_().item())
        coin, self.seed = drawn % _COIN, drawn // _COIN
        least = int(p * 256)
        self.threshold = least + (coin < round((p * 256 - least) * _COIN))
        """Bytes below it drop their element; of 0 to 256."""

    @property
    def scale(self) -> float:
        """What kept elements are multiplied with; 0 where everything is dropped."""
        return 256 / (256 - self.threshold) if self.threshold < 256 else 0.0

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the mask for x (n, i), what `again` makes it from): 1 where an element is kept, else 0."""
        if x.device.type != "cpu":
            return self.again(x, None), None
        random = np.random.SFC64(self.seed).random_raw(-(-x.numel() // 8)).view(np.uint8)[: x.numel()]
        kept = np.greater_equal(random, self.threshold, out=random.view(np.bool_))
        return torch.from_numpy(random).view(x.shape), torch.from_numpy(np.packbits(kept))

    def again(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """The mask that `draw` made for this x."""
        if bits is not None:
            return torch.from_numpy(np.unpackbits(bits.numpy(), count=x.numel())).view(x.shape)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        random = torch.randint(256, x.shape, dtype=torch.int16, device=x.device, generator=generator)
        return (random >= self.threshold).to(torch.uint8)


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """x (n, i) where `keep`, else 0, unscaled; differentiable in x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return x.masked_fill(keep == 0, 0)
    return (x.contiguous().view(_BITS[x.element_size()]) * keep).view(x.dtype)


def mask_(x: Tensor, keep: Tensor) -> Tensor:
    """`masked` in place, for contiguous memory of the caller's own; it is given back."""
    x.view(_BITS[x.element_size()]).mul_(keep)
    return x
