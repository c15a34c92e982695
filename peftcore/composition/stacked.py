"""Many low-rank adapters over the rows of one batch in two products: y = W x + ((x Aᵀ) ∘ G) Bᵀ. No gradients.

A and B are the adapters' own, one below and one beside the other; G is 0 where a row is not an adapter's (whatever
x Aᵀ is there), and its weight elsewhere. Layers of one input go through it together, as in `peftcore.kernels.low_rank`.
Where every adapter has as many rows, the products are batched by adapter, and nothing is computed to be dropped.

The stacks are kept, in the activations' type, until another set of adapters acts or their fingerprint has changed
(`peftcore.composition.fingerprint`). Those of adapters that train are kept for the length of one `generate` only.

Shapes: n tokens, i in_features, o out_features, R the ranks of all adapters, of all layers together.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.composition.fingerprint import Fingerprint
from peftcore.composition.route import Blocks, Mask, Run
from peftcore.kernels.low_rank import LowRankBranch

LONG = 64
"""Tokens (count) of a stretch with one composition, on average, from which each is computed by itself."""
MANY = 8
"""Adapters (count) from which products batched by adapter make up for sorting rows; in 16 bits none did, on CPUs."""
KEPT = 2
"""Stacks that a layer keeps at most: one for prompts that are read, one for the batch that is decoded."""


class Stacked(NamedTuple):
    """The adapters of some layers that read one input."""

    a: Tensor
    """(R, i)"""
    b: list[Tensor]
    """Bᵀ of each layer (R of that layer, o), scaled; a decoding step multiplies it faster so than transposed."""
    ranks: tuple[int, ...]
    """Of each adapter of each layer."""
    sizes: list[int]
    """R of each layer."""
    places: list[tuple[int, int, int]]
    """(layer, row of `a`, row of the layer's `b`) where each adapter begins."""
    batched: list[tuple[Tensor, Tensor]]
    """(A by adapter (K, i, r), B by adapter (K, r, o)) of each layer, in the same memory; [] where ranks differ."""
    fingerprint: Fingerprint
    """Of the adapters, taken before their weights were read."""

    def is_current(self) -> bool:
        """Whether the weights are still those that were stacked."""
        return self.fingerprint.holds(trusts_learning=False)


def stack(layers: Sequence[Sequence[Adapter]], dtype: torch.dtype) -> Stacked | None:
    """The adapters of each layer; None if one of them is not two factors and nothing else.

    Several that are not all finite are no stack either: 0 x NaN is NaN, so one would spoil the rows of all.
    """
    fingerprint = Fingerprint(adapter for adapters in layers for adapter in adapters)
    factors = [[_factors(adapter) for adapter in adapters] for adapters in layers]
    if not all(_is_plain(one) for own in factors for one in own):
        return None
    plain: list[list[LowRankBranch]] = factors  # type: ignore[assignment]
    ranks = tuple(len(one.a) for own in plain for one in own)
    a = torch.cat([one.a.to(dtype) for own in plain for one in own])
    b = [torch.cat([(one.b * one.scaling).to(dtype).T for one in own]) for own in plain]
    if any(len(own) > 1 for own in plain) and not all(bool(factor.isfinite().all()) for factor in (a, *b)):
        return None
    sizes = [sum(len(one.a) for one in own) for own in plain]
    alike = all(len({len(one.a) for one in own}) == 1 and len(own) == len(plain[0]) for own in plain)
    batched = zip(a.split(sizes), b, strict=True) if alike else ()
    return Stacked(
        a,
        b,
        ranks,
        sizes,
        _places([[len(one.a) for one in own] for own in plain]),
        [(_by_adapter(below, len(plain[0])).mT, _by_adapter(beside, len(plain[0]))) for below, beside in batched],
        fingerprint,
    )


def _by_adapter(rows: Tensor, count: int) -> Tensor:
    return rows.view(count, -1, rows.shape[1])


def _places(ranks: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    found, row = [], 0
    for layer, own in enumerate(ranks):
        column = 0
        for rank in own:
            found.append((layer, row, column))
            row, column = row + rank, column + rank
    return found


def can_be_stacked(adapters: Iterable[Adapter]) -> bool:
    """Whether each of them is two factors and nothing else."""
    return all(_is_plain(_factors(adapter)) for adapter in adapters)


def _factors(adapter: Adapter) -> LowRankBranch | None:
    """An adapter as two factors, where these are all that it adds."""
    return adapter.low_rank() if adapter.trained_bias is None else None


def _is_plain(one: LowRankBranch | None) -> bool:
    return one is not None and one.gain is None and not one.dropout


class Wanted(NamedTuple):
    """What a stack is made from, and for what."""

    dtype: torch.dtype
    device: torch.device
    training: bool
    """Whether the layers train, for then adapters may drop some of their input."""
    adapters: tuple[tuple[Adapter, ...], ...]
    """Of each layer."""


def kept_stack(keep: dict[Any, Any], layer: Any, wanted: Wanted) -> Stacked | None:
    """The stack of `wanted` from what is kept for `layer`, brought up to date.

    keep: {layer: ((wanted, stack), ...)}; changed by one assignment, for other threads read it.
    """
    kept = keep.get(layer, ())
    found = next((stacked for own, stacked in kept if own is wanted or own == wanted), None)
    if found is not None and found.is_current():
        return found
    found = stack(wanted.adapters, wanted.dtype)
    if found is not None and found.is_current():
        keep[layer] = ((wanted, found), *[pair for pair in kept if pair[0] != wanted][: KEPT - 1])
    return found


def stretched_outputs(
    x: Tensor, bases: Sequence[BaseWeight], stacked: Stacked, names: Sequence[str], runs: Sequence[Run]
) -> list[Tensor]:
    """The same stretch by stretch, each with its own adapters alone: less to compute where stretches are long.

    names: of the adapters of each layer, one layer after another.
    """
    flat = x.reshape(-1, x.shape[-1])
    ys = [base.product(flat) for base in bases]
    for name, (layer, row, column), rank in zip(names, stacked.places, stacked.ranks, strict=True):
        a, b = stacked.a[row : row + rank], stacked.b[layer][column : column + rank]
        for start, stop, weights in runs:
            if weight := weights.get(name, 0.0):
                h = F.linear(flat[start:stop], a)
                ys[layer][start:stop].addmm_(h if weight == 1 else h * weight, b)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def batched_outputs(x: Tensor, bases: Sequence[BaseWeight], stacked: Stacked, blocks: Blocks) -> list[Tensor]:
    """The same for rows of which each has one adapter, and every adapter as many."""
    flat = blocks.sorted(x).reshape(-1, x.shape[-1])
    own = flat.view(blocks.adapters, -1, x.shape[-1])
    ys = []
    for base, (a, b) in zip(bases, stacked.batched, strict=True):
        y = base.product(flat)
        y.view(blocks.adapters, -1, y.shape[1]).baddbmm_(own.bmm(a), b)
        ys.append(blocks.unsorted(y).view(*x.shape[:-1], y.shape[-1]))
    return ys


def stacked_outputs(x: Tensor, bases: Sequence[BaseWeight], stacked: Stacked, mask: Mask | None) -> list[Tensor]:
    """y (..., o) of each layer for their common x (..., i); mask: None where every row has every adapter."""
    flat = x.reshape(-1, x.shape[-1])
    h = F.linear(flat, stacked.a)
    if mask is not None:
        h = mask.apply(h)
    parts = (h,) if len(bases) == 1 else h.split(stacked.sizes, 1)
    ys = [base.product(flat).addmm_(own, b) for base, own, b in zip(bases, parts, stacked.b, strict=True)]
    return ys if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
