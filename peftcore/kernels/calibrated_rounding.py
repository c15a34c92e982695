"""Rounding to a quantised storage's own grid, with the errors of earlier columns compensated by later ones.

GPTQ: arXiv:2210.17323. In contrast to GPTQ, scales and offsets are given and stay, so the codes fit the storage.
Shapes: o out_features, i in_features.
"""

import torch
from torch import Tensor

from peftcore.bases.grid import Grid
from peftcore.kernels.input_moments import cholesky_root

BLOCK = 128
"""Columns after which the later columns are updated together."""


def calibrated_codes(
    weight: Tensor, moment: Tensor, grid: Grid, damping: float = 0.01, activation_order: bool = True
) -> Tensor:
    """Return codes whose values Q make tr((W − Q) R (W − Q)ᵀ), the mean squared error of the output, small.

    The columns are rounded one after another. The error e of a column is spread over the later columns by the row of
    the Cholesky factor of R⁻¹, which is the change of them that compensates most of e.

    Args:
        weight: W (o, i), the weight before quantisation.
        moment: R (i, i), the second moment of the layer's inputs.
        grid: Values that the storage can hold.
        damping: Share of the mean of R's diagonal that is added to the diagonal.
        activation_order: Round the columns with the largest inputs first.

    Returns:
        Codes (o, i), uint8.
    """
    order = moment.diagonal().argsort(descending=True, stable=True) if activation_order else None
    if order is not None:
        weight, moment, grid = weight[:, order], moment[order][:, order], grid.permuted(order)
    inverse = torch.cholesky_inverse(cholesky_root(moment, damping))
    spread = torch.linalg.cholesky(inverse, upper=True)
    spread = (spread / spread.diagonal()[:, None]).float()
    weight = weight.float().clone()
    columns = weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = torch.empty(len(weight), last - first, device=weight.device)
        for at in range(first, last):
            codes[:, at] = chosen = grid.nearest(weight[:, at], at)
            error = errors[:, at - first] = weight[:, at] - grid.values(chosen, at)
            weight[:, at + 1 : last].addr_(error, spread[at, at + 1 : last], alpha=-1)
        weight[:, last:] -= errors @ spread[first:last, last:]
    if order is None:
        return codes
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored
