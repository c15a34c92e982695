"""Dropout that a seed brings back: the backward pass makes the mask again, so nothing of the input's size is kept.

Each element is dropped by itself where 15 random bits fall below p·2¹⁵, so p is met to 1.6e-5 and the scale 1/(1 − p)
is that of the p that is met. On a CPU the bits come from numpy's SFC64, whose raw words cost a twentieth of PyTorch's
Bernoulli numbers; elsewhere from PyTorch's generator of that device.
"""

import numpy as np
import torch
from torch import Tensor

_BITS = 15
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def new_seed() -> int:
    """A seed out of PyTorch's default generator, so that `manual_seed` and checkpointing's state reach it."""
    return int(torch.empty((), dtype=torch.int64).random_().item())


def threshold(p: float) -> int:
    """Of 2¹⁵ equally likely draws, how many drop an element."""
    return round(p * 2**_BITS)


def keep_scale(p: float) -> float:
    """1/(1 − p) for the probability that `threshold` meets; 0 where everything is dropped."""
    kept = 2**_BITS - threshold(p)
    return 2**_BITS / kept if kept else 0.0


def keep_mask(shape: torch.Size, p: float, seed: int, device: torch.device) -> Tensor:
    """int16 of `shape`: all bits set where an element is kept, none where it is dropped; equal for equal arguments."""
    words = -(-shape.numel() // 4)
    if device.type == "cpu":
        bits = torch.from_numpy(np.random.SFC64(seed).random_raw(words).view(np.int16))
    else:
        generator = torch.Generator(device).manual_seed(seed)
        bits = torch.empty(words, dtype=torch.int64, device=device).random_(generator=generator).view(torch.int16)
    draws = bits[: shape.numel()].bitwise_and_(2**_BITS - 1)
    return draws.sub_(threshold(p)).bitwise_right_shift_(15).bitwise_not_().view(shape)


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """x where `keep`, else 0, unscaled; differentiable in x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return x.masked_fill(keep == 0, 0)
    bits = _SIGNED[x.element_size()]
    return (x.contiguous().view(bits) & keep.to(bits)).view(x.dtype)
