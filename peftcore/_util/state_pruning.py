"""Optimiser-state pruning: remove rows or columns of a parameter together with the optimiser's state for them.

Moments of the parameter's shape are indexed like the parameter. bitsandbytes stores large moments in 8 bits: codes
(uint8, of the parameter's shape) and one largest value for every 256 codes in memory order. These moments are
dequantised, indexed and quantised again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_BLOCK = 256
"""Number of codes that share one largest value (bitsandbytes' blockwise optimisers)."""


@torch.no_grad()
def pruned(parameter: nn.Parameter, axis: int, indices: Tensor, optimizer: Optimizer) -> nn.Parameter:
    """Return a parameter with the selected indices only, and replace the old parameter and its state in the optimiser.

    Args:
        parameter: The parameter to prune; `can_prune` must be true for it.
        axis: The axis to index.
        indices: The remaining indices along that axis (m,).
        optimizer: The optimiser, whose groups and state are changed.
    """
    new = nn.Parameter(parameter.detach().index_select(axis, indices), requires_grad=parameter.requires_grad)
    for group in optimizer.param_groups:
        group["params"] = [new if each is parameter else each for each in group["params"]]
    if parameter in optimizer.state:
        optimizer.state[new] = _pruned_state(optimizer.state.pop(parameter), parameter.shape, axis, indices)
    return new


def can_prune(parameter: nn.Parameter, optimizer: Optimizer) -> bool:
    """Return True if each tensor in the optimiser's state of the parameter has a known form."""
    state = optimizer.state.get(parameter, {})
    known = {name for number in _eight_bit_moments(state) for name in (f"absmax{number}", f"qmap{number}")}
    known.add("unorm_vec")
    return all(
        not isinstance(value, Tensor) or not value.dim() or value.shape == parameter.shape or name in known
        for name, value in state.items()
    )


def _eight_bit_moments(state: Mapping[str, Any]) -> list[str]:
    """Return the name suffixes, such as "1" and "2", of the moments that bitsandbytes stores in 8 bits."""
    return [name.removeprefix("qmap") for name in state if name.startswith("qmap")]


def _pruned_state(state: Mapping[str, Any], shape: torch.Size, axis: int, indices: Tensor) -> dict[str, Any]:
    new = dict(state)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape == shape and value.dtype != torch.uint8:
            new[name] = value.index_select(axis, indices)
    for number in _eight_bit_moments(state):
        new |= _pruned_moment(state, number, axis, indices)
    return new


def _pruned_moment(state: Mapping[str, Any], number: str, axis: int, indices: Tensor) -> dict[str, Any]:
    from bitsandbytes import functional as bnb

    codes, scales, code = (state[f"{name}{number}"] for name in ("state", "absmax", "qmap"))
    moment = bnb.dequantize_blockwise(codes, absmax=scales, code=code, blocksize=_BLOCK)
    remaining = moment.index_select(axis, indices).contiguous()
    new_codes, quant_state = bnb.quantize_blockwise(remaining, code=code, blocksize=_BLOCK)
    return {f"state{number}": new_codes, f"absmax{number}": quant_state.absmax}
