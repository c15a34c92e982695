"""Dropout that a seed brings back: the backward pass makes the mask again, so nothing of the input's size is kept.

An element is dropped where its random byte is below p·256. Where that is no whole number, each row takes the one
below or above by a coin of its own, so that every element's chance is p. On a CPU the bytes come from numpy's SFC64,
whose raw words cost a twentieth of PyTorch's Bernoulli numbers; elsewhere from PyTorch's generator of that device.

Shapes: n rows, i features.
"""

import numpy as np
import torch
from torch import Tensor

_COIN = 2**15
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def new_seed() -> int:
    """A seed out of PyTorch's default generator, so that `manual_seed` and checkpointing's state reach it."""
    return int(torch.empty((), dtype=torch.int64).random_().item())


def keep_scale(p: float) -> float:
    """1/(1 − p), what kept elements are multiplied with; 0 where everything is dropped."""
    return 1 / (1 - p) if p < 1 else 0.0


def keep_mask(rows: int, features: int, p: float, seed: int, device: torch.device) -> Tensor:
    """(n, i) int16: all bits set where an element is kept, none where it is dropped; equal for equal arguments."""
    random = _random_bytes(2 * rows + rows * features, seed, device)
    least = int(p * 256)
    coins = random[: 2 * rows].view(torch.int16).bitwise_and(_COIN - 1)
    highest_dropped = (coins < round((p * 256 - least) * _COIN)).to(torch.int16).add_(least - 1)
    draws = random[2 * rows : 2 * rows + rows * features].view(rows, features).to(torch.int16)
    return torch.sub(highest_dropped[:, None], draws).bitwise_right_shift_(15)  # the sign, on every bit


def _random_bytes(count: int, seed: int, device: torch.device) -> Tensor:
    words = -(-count // 8)
    if device.type == "cpu":
        return torch.from_numpy(np.random.SFC64(seed).random_raw(words).view(np.uint8))
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(256, (8 * words,), dtype=torch.uint8, device=device, generator=generator)


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """x (n, i) where `keep`, else 0, unscaled; differentiable in x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return x.masked_fill(keep == 0, 0)
    bits = _SIGNED[x.element_size()]
    return (x.contiguous().view(bits) & keep.to(bits)).view(x.dtype)
