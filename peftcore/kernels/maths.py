"""Mathematical functions that several methods share."""

from functools import lru_cache

import torch
from torch import Tensor

from peftcore.bases import BaseWeight

SMALL = 1 << 16
"""Largest tensor (count of elements) for which two operations cost less than one pass over memory."""


def weight_shape(base: BaseWeight) -> tuple[int, ...]:
    """Return the shape of the canonical weight: (o, i), (o, i/groups, *kernel), or (d, v) for an embedding."""
    groups = base.layer.groups if base.kind == "conv" else 1
    return (base.out_features, base.in_features // groups, *base.kernel)


@lru_cache(maxsize=64)
def random_places(size: int, count: int, seed: int | None) -> Tensor:
    """Draw distinct indices below `size`, on the CPU, by the same random numbers as HF PEFT.

    The result is cached, because the permutation of a whole weight takes seconds. All callers share one tensor, so it
    must not be modified.

    Args:
        size: number of elements to choose from.
        count: number of indices.
        seed: seed of the draw; None: the default seed of a new generator, a constant.

    Returns:
        Indices (count,).
    """
    generator = torch.Generator(device="cpu")
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[
        :count
    ].clone()  # a view would keep the whole permutation in memory


def widened(parameter: Tensor) -> Tensor:
    """Return the parameter in float32, or unchanged in float64.

    For orthogonal factors and spectra: on CPUs no solver and no FFT supports 16-bit types, and a matrix that is rounded
    to 16 bits is not orthogonal.
    """
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def scaled(y: Tensor, scale: Tensor) -> Tensor:
    """Return y·scale for y of any type; `scale` is float32 and broadcasts against y.

    In 16-bit types the result is y + y·(scale − 1). In bfloat16, 1.003 rounds to 1, but 0.003 does not round to 0. So a
    scale near 1 has an effect, and the error is at most half a unit in the last place of y. Small values without
    gradients are multiplied in float32 and rounded once, which takes fewer operations.
    """
    if y.dtype.itemsize > 2:
        return y * (scale if scale.dtype is y.dtype else scale.to(y.dtype))
    if y.numel() <= SMALL and not torch.is_grad_enabled():
        return (y * scale).to(y.dtype)
    return torch.addcmul(y, y, (scale - 1).to(y.dtype))


def cayley(skew: Tensor) -> Tensor:
    """Return the Cayley transform (I − S)(I + S)⁻¹ of skew-symmetric S (..., n, n), in float32 or float64.

    The result is orthogonal and has no eigenvalue −1.
    """
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def neumann(skew: Tensor, terms: int) -> Tensor:
    """Return I + 2S + 2S² + … + Sᵐ, an approximation of (I + S)(I − S)⁻¹ (OFTv2, arXiv:2506.19847).

    As in HF PEFT, m = terms − 1, except that terms = 3 gives m = 3, and terms = 2 gives I + 2S.
    """
    last = 1 if terms == 2 else max(terms - 1, 3)
    power = skew
    total = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device) + 2 * skew
    for n in range(2, last + 1):
        power = power @ skew
        total = total + (power if n == last else 2 * power)
    return total


def rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x R for the block-diagonal matrix R.

    In 16-bit types the result is x + x (R − I), so that small rotations have an effect, as in `scaled`.

    Args:
        x: input (..., n·b).
        blocks: diagonal blocks (n, b, b), or (1, b, b) for one block that is repeated n times.
    """
    narrow = x.dtype.itemsize <= 2
    if narrow:
        blocks = blocks - torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    parts, blocks = x.unflatten(-1, (-1, blocks.shape[-1])), blocks.to(x.dtype)
    rotated = parts @ blocks[0] if len(blocks) == 1 else torch.einsum("...nb,nbc->...nc", parts, blocks)
    return x + rotated.flatten(-2) if narrow else rotated.flatten(-2)


def drop_blocks(blocks: Tensor, probability: float) -> Tensor:
    """Apply multiplicative dropout: ⌊p·n⌋ of n blocks (n, b, b), chosen at random, become the identity."""
    dropped = torch.randperm(len(blocks), device=blocks.device) < int(probability * len(blocks))
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(dropped.view(-1, 1, 1), eye, blocks)


def keep_rows(rows: int, like: Tensor, row_dropout: float, module_dropout: float, rescale: bool) -> Tensor | None:
    """Draw LyCORIS's row dropout and module dropout as factors of the rows of ΔW.

    Module dropout gives zeros for all rows instead of skipping ΔW: DDP needs a gradient of every parameter. The random
    numbers are HF PEFT's: one for the module, also if its probability is 0, and then one for each row.

    Args:
        rows: number of rows.
        like: tensor whose type and device the result has.
        row_dropout: probability of dropping a row.
        module_dropout: probability of dropping all rows.
        rescale: True to divide by the share of rows that are kept.

    Returns:
        Factors (rows,); None if both probabilities are 0.
    """
    keeps = torch.rand(1, device="cpu") > module_dropout
    if not row_dropout and not module_dropout:
        return None
    factors = torch.ones(rows, dtype=like.dtype, device=like.device)
    if row_dropout and (not module_dropout or bool(keeps)):
        factors = (torch.rand(rows, device="cpu") > row_dropout).to(factors)
        if rescale:
            factors = factors / factors.mean().clamp(min=1 / rows)
    return factors * keeps.to(factors) if module_dropout else factors
