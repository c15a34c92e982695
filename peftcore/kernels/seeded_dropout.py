"""Dropout with a compact mask: between forward and backward pass the mask is one bit per element, or only a seed.

An element is dropped if its random byte is below a threshold t. If p·256 is not an integer, each call rounds it up or
down at random, so that the drop probability of every element is p. The scale is 1/(1 − t/256), so that the mean of the
output is the input.

On a CPU the bytes come from NumPy's SFC64, which costs a twentieth of PyTorch's Bernoulli numbers. The mask is saved as
one bit per element. On other devices PyTorch's generator of that device draws the mask again from the seed.

Shapes: n rows, i features.
"""

import numpy as np
import torch
from torch import Tensor

_COIN = 2**15
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""{bytes per element: integer type}. Multiplying the bits by 0 or 1 is exact, and drops infinities and NaN too."""


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

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw the dropout mask of x (n, i).

        Returns:
            The mask, 1 for kept elements and 0 for dropped ones, and the packed bits from which `again` restores the
            mask. The bits are None on devices other than the CPU, where `again` draws from the seed.
        """
        if x.device.type != "cpu":
            return self.again(x, None), None
        random = np.random.SFC64(self.seed).random_raw(-(-x.numel() // 8)).view(np.uint8)[: x.numel()]
        keep = np.greater_equal(random, self.threshold, out=random.view(np.bool_))
        return torch.from_numpy(random).view(x.shape), torch.from_numpy(np.packbits(keep))

    def again(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """Return the mask that `draw` returned for this x."""
        if bits is not None:
            return torch.from_numpy(np.unpackbits(bits.numpy(), count=x.numel())).view(x.shape)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        random = torch.randint(256, x.shape, dtype=torch.int16, device=x.device, generator=generator)
        return (random >= self.threshold).to(torch.uint8)


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """Return x (n, i) with 0 for dropped elements, not scaled; differentiable in x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return x.masked_fill(keep == 0, 0)
    return (x.contiguous().view(_BITS[x.element_size()]) * keep).view(x.dtype)


def mask_(x: Tensor, keep: Tensor) -> Tensor:
    """Apply `masked` in place to a contiguous tensor, and return the tensor."""
    x.view(_BITS[x.element_size()]).mul_(keep)
    return x
