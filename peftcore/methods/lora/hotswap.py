"""LoRA layers whose weights are exchanged for those of another LoRA, in the same memory.

Compiled code is compiled again if a weight changes its shape, or if a Python number that it has read changes. So a
layer is enlarged to the largest rank beforehand (`enlarge`), and its scaling becomes a tensor (`use_tensor_scaling`).
The further components are zero, so they do not change BA.

Shapes: as in `peftcore.methods.lora.adapter`. R is the rank after enlarging.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from peftcore.errors import HotswapError
from peftcore.methods.lora.adapter import Lora


def use_tensor_scaling(lora: Lora) -> None:
    """Keep the scaling of a layer as a tensor on the layer's device; assigning a number then changes its value."""
    if not isinstance(lora.scaling, Tensor):
        device, dtype = lora.own_factors()[0].device, torch.promote_types(lora.own_factors()[0].dtype, torch.float32)
        lora.scaling = torch.tensor(lora.scaling, device=device, dtype=dtype)


def check_rank(lora: Lora, rank: int, path: str) -> None:
    """Check that a layer can be enlarged.

    Args:
        lora: the layer's adapter.
        rank: R (count).
        path: the layer's path, for the error message.

    Raises:
        HotswapError: the layer's rank is larger, its groups do not divide `rank`, or its A or B is packed.
    """
    if lora.config.packs_factors:
        raise HotswapError(f"{path} trains parts of A or B (BD-LoRA, QA-LoRA), which cannot be enlarged; load it anew")
    if lora.r > rank:
        raise HotswapError(f"{path} has rank {lora.r}, which is larger than target_rank={rank}; give the largest rank")
    if rank % lora.groups:
        raise HotswapError(
            f"target_rank={rank} is not a multiple of the {lora.groups} groups of {path}; "
            f"try {rank + lora.groups - rank % lora.groups}"
        )


@torch.no_grad()
def enlarge(lora: Lora, rank: int) -> None:
    """Give the factors of a layer the rank R = `rank`; the output stays the same."""
    if lora.source is None and lora.r != rank:
        a, b = with_zeros(lora, lora.lora_A_weight, lora.lora_B_weight, rank)
        lora.lora_A_weight.data, lora.lora_B_weight.data = a, b
        if lora.start is not None:  # saved below A and B, as the second half of rank 2R
            lora.start_A, lora.start_B = with_zeros(lora, *lora.start, rank)
    lora.r = rank


def with_zeros(lora: Lora, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of rank R = `rank` with the same product: the further components are zero.

    Each group of a convolution, and each expert, has a block of components of its own.
    """
    experts, groups = lora.base.count, lora.groups
    a_blocks = _longer(a.reshape(experts * groups, -1, *a.shape[1:]), rank // groups)
    b_blocks = _longer(b.reshape(len(b), -1, experts, *b.shape[2:]), rank // groups)
    return a_blocks.flatten(0, 1), b_blocks.flatten(1, 2)


def _longer(tensor: Tensor, length: int) -> Tensor:
    """Return a tensor with zeros appended along its axis 1."""
    longer = tensor.new_zeros(len(tensor), length, *tensor.shape[2:])
    longer[:, : tensor.shape[1]] = tensor
    return longer


def rank_of(lora: Lora, tensors: Mapping[str, Tensor]) -> int | None:
    """Return the rank of another adapter's tensors for this layer; None if they do not fit the layer.

    Args:
        lora: the layer's adapter.
        tensors: {key suffix: tensor}, all of `lora.checkpoint_keys()`.
    """
    key_a, key_b, *others = lora.checkpoint_keys().values()
    own, experts = lora.checkpoint_tensors(), lora.base.count
    if lora.source is None:
        a, b = tensors[key_a], tensors[key_b]
        rank = len(a) // experts
        shape_b = (own[key_b].shape[0], rank * experts // lora.groups, *own[key_b].shape[2:])
        if a.shape != (rank * experts, *own[key_a].shape[1:]) or b.shape != shape_b or rank % lora.groups:
            return None
    else:
        rank = len(tensors[key_a])
    return rank if all(lora.fits(key, tensors[key]) for key in others) else None


@torch.no_grad()
def exchange(lora: Lora, tensors: Mapping[str, Tensor], alpha: float, rank: int) -> None:
    """Write another adapter's tensors into a layer, in the same memory unless their rank is larger.

    Args:
        lora: the layer's adapter.
        tensors: {key suffix: tensor} that `rank_of` accepts.
        alpha: α of the other adapter at this layer.
        rank: rank of the other adapter at this layer, by which α is divided.
    """
    key_a, key_b, *_ = lora.checkpoint_keys().values()
    written = rank_of(lora, tensors)
    assert written is not None
    enlarge(lora, max(written, lora.r))
    if lora.source is None:
        a, b = with_zeros(lora, tensors[key_a], tensors[key_b], lora.r)
        tensors = {**tensors, key_a: a, key_b: b}
    lora.load_checkpoint_tensors(tensors)
    lora.scaling = lora.scaling_for(rank, alpha)
    vars(lora).pop("start_scaling", None)


@torch.no_grad()
def clear(lora: Lora) -> None:
    """Make a layer compute what its base computes, as an adapter does that leaves the layer out."""
    for parameter in lora.parameters(recurse=False):
        parameter.zero_()
    lora.reset_variants()
    lora.mark_changed()
