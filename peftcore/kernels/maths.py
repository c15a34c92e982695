"""Pure functions that several methods share."""

from functools import lru_cache

import torch
from torch import Tensor

from peftcore.bases import BaseWeight


def weight_shape(base: BaseWeight) -> tuple[int, ...]:
    """Shape of the canonical weight: (o, i), (o, i/groups, *kernel), or (d, v) for an embedding."""
    groups = base.layer.groups if base.kind == "conv" else 1
    return (base.out_features, base.in_features // groups, *base.kernel)


@lru_cache(maxsize=64)
def random_places(size: int, count: int, seed: int | None) -> Tensor:
    """`count` of the numbers below `size` without repeats (count,), on the CPU, as PEFT draws them from a seed.

    seed: None is the default seed of a fresh generator, so the same places every time.
    Layers of one shape get one tensor, since permuting a whole weight takes seconds: do not write into it.
    """
    generator = torch.Generator(device="cpu")
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:count].clone()  # a view would keep them all


def widened(parameter: Tensor) -> Tensor:
    """The parameter in float32, or as it is if it is in float32 or float64.

    For factors that are orthogonal or a spectrum: no solver and no FFT takes 16 bits on CPUs, and rounding to 16 bits
    leaves factors that are not orthogonal.
    """
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def scaled(y: Tensor, scale: Tensor) -> Tensor:
    """y·scale, where `scale`, in float32, broadcasts against y of any type.

    In 16 bits it is y + y·(scale − 1): rounded to bfloat16, 1.003 is 1, but 0.003 is not 0. So changes smaller than the
    type's precision act, and the error stays within half a unit in the last place of y.
    """
    if y.dtype.itemsize > 2:
        return y * scale.to(y.dtype)
    return torch.addcmul(y, y, (scale - 1).to(y.dtype))


def cayley(skew: Tensor) -> Tensor:
    """(I − S)(I + S)⁻¹: orthogonal, without eigenvalue −1, for skew-symmetric S (..., n, n) in float32 or float64."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x R for R = diag(blocks): x (..., n·b), blocks (n, b, b), or (1, b, b) for one that all n share.

    In 16 bits it is x + x (R − I), so that rotations smaller than the type's precision act, as in `scaled`.
    """
    narrow = x.dtype.itemsize <= 2
    if narrow:
        blocks = blocks - torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    parts, blocks = x.unflatten(-1, (-1, blocks.shape[-1])), blocks.to(x.dtype)
    rotated = parts @ blocks[0] if len(blocks) == 1 else torch.einsum("...nb,nbc->...nc", parts, blocks)
    return x + rotated.flatten(-2) if narrow else rotated.flatten(-2)


def drop_blocks(blocks: Tensor, probability: float) -> Tensor:
    """Multiplicative dropout: ⌊p·n⌋ of n blocks (n, b, b), chosen at random, become the identity."""
    chosen = torch.randperm(len(blocks), device=blocks.device) < int(probability * len(blocks))
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(chosen.view(-1, 1, 1), eye, blocks)


def keep_rows(rows: int, like: Tensor, row_dropout: float, module_dropout: float, rescale: bool) -> Tensor:
    """LyCORIS's dropouts as factors (rows,) of ΔW's rows, in the type of `like`: single rows, or all at once.

    All at once gives zeros instead of leaving ΔW out: every parameter still gets a gradient, which DDP waits for.
    """
    kept = (torch.rand(rows, device=like.device) >= row_dropout).to(like.dtype)
    if rescale:
        kept = kept / kept.mean().clamp(min=1 / rows)
    return kept * (torch.rand((), device=like.device) >= module_dropout)
