"""A parameter cut down to some of its rows or columns, together with what its optimiser keeps of it.

Moments of the parameter's shape are cut like it. bitsandbytes keeps large ones in 8 bits, as codes (uint8, of the
parameter's shape) and a largest value for every 256 of them in memory order, so they are read, cut and written again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_BLOCK = 256
"""Codes that share one largest value (bitsandbytes' blockwise optimisers)."""


@torch.no_grad()
def pruned(parameter: nn.Parameter, axis: int, kept: Tensor, optimizer: Optimizer) -> nn.Parameter:
    """A new parameter of the indices `kept` along `axis`, in the old one's place in the optimiser and its state."""
    new = nn.Parameter(parameter.detach().index_select(axis, kept), requires_grad=parameter.requires_grad)
    for group in optimizer.param_groups:
        group["params"] = [new if each is parameter else each for each in group["params"]]
    if parameter in optimizer.state:
        optimizer.state[new] = _cut(optimizer.state.pop(parameter), parameter.shape, axis, kept)
    return new


def can_prune(parameter: nn.Parameter, optimizer: Optimizer) -> bool:
    """Whether everything that the optimiser keeps of the parameter is in a form known here."""
    state = optimizer.state.get(parameter, {})
    known = {name for moment in _packed(state) for name in (f"absmax{moment}", f"qmap{moment}")} | {"unorm_vec"}
    return all(
        not isinstance(value, Tensor) or not value.dim() or value.shape == parameter.shape or name in known
        for name, value in state.items()
    )


def _packed(state: Mapping[str, Any]) -> list[str]:
    """Numbers of the moments that are in 8 bits."""
    return [name.removeprefix("qmap") for name in state if name.startswith("qmap")]


def _cut(state: Mapping[str, Any], shape: torch.Size, axis: int, kept: Tensor) -> dict[str, Any]:
    new = dict(state)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape == shape and value.dtype != torch.uint8:
            new[name] = value.index_select(axis, kept)
    for moment in _packed(state):
        new |= _repacked(state, moment, axis, kept)
    return new


def _repacked(state: Mapping[str, Any], moment: str, axis: int, kept: Tensor) -> dict[str, Any]:
    from bitsandbytes import functional as bnb

    codes, scales, code = (state[f"{name}{moment}"] for name in ("state", "absmax", "qmap"))
    whole = bnb.dequantize_blockwise(codes, absmax=scales, code=code, blocksize=_BLOCK)
    fewer = whole.index_select(axis, kept).contiguous()
    packed, written = bnb.quantize_blockwise(fewer, code=code, blocksize=_BLOCK)
    return {f"state{moment}": packed, f"absmax{moment}": written.absmax}
