"""Many low-rank adapters over the rows of one batch in two products: y = W x + ((x Aᵀ) ∘ G) Bᵀ. No gradients.

A and B are the adapters' own, one below and one beside the other; G is 0 where a row is not an adapter's (whatever
x Aᵀ is there), and its weight elsewhere. Layers of one input go through it together, as in `peftcore.low_rank`.

The stacks are kept, in the activations' type, until another set of adapters acts or a weight has changed, which is told
by autograd's version counters: an edit through `.data` is not seen. Adapters that train are stacked anew each time.

Shapes: n tokens, i in_features, o out_features, R the ranks of all adapters, of all layers together.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.composition.route import Mask, Run
from peftcore.low_rank import LowRank

LONG = 64
"""Tokens (count) of a stretch with one composition, on average, from which each is computed by itself."""
KEPT = 2
"""Stacks that a layer keeps at most: one for prompts that are read, one for the batch that is decoded."""


class Stacked(NamedTuple):
    """The adapters of some layers that read one input."""

    a: Tensor
    """(R, i)"""
    b: list[Tensor]
    """(o, R of that layer), scaled."""
    ranks: tuple[int, ...]
    """Of each adapter of each layer."""
    sizes: list[int]
    """R of each layer."""
    places: list[tuple[int, int, int]]
    """(layer, row of `a`, column of the layer's `b`) where each adapter begins."""
    made_from: list[Tensor]
    versions: list[int]

    def is_current(self) -> bool:
        """Whether the weights are still those that were stacked, and none of them trains."""
        return [-1 if tensor.requires_grad else tensor._version for tensor in self.made_from] == self.versions


def stack(layers: Sequence[Sequence[Adapter]], dtype: torch.dtype) -> Stacked | None:
    """The adapters of each layer; None if one of them is not two factors and nothing else.

    Several that are not all finite are no stack either: 0 x NaN is NaN, so one would spoil the rows of all.
    """
    factors = [[adapter.low_rank() for adapter in adapters] for adapters in layers]
    if not all(_is_plain(one) for own in factors for one in own):
        return None
    plain: list[list[LowRank]] = factors  # type: ignore[assignment]
    ranks = tuple(len(one.a) for own in plain for one in own)
    a = torch.cat([one.a.to(dtype) for own in plain for one in own])
    b = [torch.cat([(one.b * one.scaling).to(dtype) for one in own], 1) for own in plain]
    if any(len(own) > 1 for own in plain) and not all(bool(factor.isfinite().all()) for factor in (a, *b)):
        return None
    made_from = [t for adapters in layers for each in adapters for t in (*each.parameters(), *each.buffers())]
    counted = not any(tensor.is_inference() for tensor in made_from)  # such tensors count no versions
    return Stacked(
        a,
        b,
        ranks,
        [sum(len(one.a) for one in own) for own in plain],
        _places([[len(one.a) for one in own] for own in plain]),
        made_from if counted else [],
        [tensor._version for tensor in made_from] if counted else [0],
    )


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
    return all(_is_plain(adapter.low_rank()) for adapter in adapters)


def _is_plain(one: LowRank | None) -> bool:
    return one is not None and one.gain is None and not one.dropout


def kept_stack(
    keep: dict[Any, Any], layer: Any, layers: Sequence[Sequence[Adapter]], dtype: torch.dtype
) -> Stacked | None:
    """The same from what is kept for `layer`, brought up to date.

    keep: {layer: ((key, stack), ...)}; changed by one assignment, for other threads read it.
    """
    key = (dtype, *(adapter for adapters in layers for adapter in adapters))
    kept = keep.get(layer, ())
    found = next((stacked for own, stacked in kept if own == key), None)
    if found is not None and found.is_current():
        return found
    found = stack(layers, dtype)
    if found is not None and found.is_current():
        keep[layer] = ((key, found), *[pair for pair in kept if pair[0] != key][: KEPT - 1])
    return found


@torch.no_grad()
def stretched_outputs(
    x: Tensor, bases: Sequence[BaseWeight], stacked: Stacked, names: Sequence[str], runs: Sequence[Run]
) -> list[Tensor]:
    """The same stretch by stretch, each with its own adapters alone: less to compute where stretches are long.

    names: of the adapters of each layer, one layer after another.
    """
    flat = x.reshape(-1, x.shape[-1])
    ys = [base.product(flat) for base in bases]
    for name, (layer, row, column), rank in zip(names, stacked.places, stacked.ranks, strict=True):
        a, b = stacked.a[row : row + rank], stacked.b[layer][:, column : column + rank].T
        for start, stop, weights in runs:
            if weight := weights.get(name, 0.0):
                h = F.linear(flat[start:stop], a)
                ys[layer][start:stop].addmm_(h if weight == 1 else h * weight, b)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


@torch.no_grad()
def stacked_outputs(x: Tensor, bases: Sequence[BaseWeight], stacked: Stacked, mask: Mask | None) -> list[Tensor]:
    """y (..., o) of each layer for their common x (..., i); mask: None where every row has every adapter."""
    flat = x.reshape(-1, x.shape[-1])
    h = F.linear(flat, stacked.a)
    if mask is not None:
        h = mask.apply(h)
    parts = (h,) if len(bases) == 1 else h.split(stacked.sizes, 1)
    ys = [base.product(flat).addmm_(own, b.T) for base, own, b in zip(bases, parts, stacked.b, strict=True)]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
