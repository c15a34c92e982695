"""Many low-rank adapters over the rows of one batch in two products: y = W x + ((x Aᵀ) ∘ G) Bᵀ. No gradients.

A and B hold the factors of all adapters, stacked along the rank. G is the mask: the weight of each adapter in each
row, 0 where a row does not use an adapter. Layers that read the same input are computed together. If every row uses one
adapter or none, the products are batched by adapter, and no product is computed only to be masked. Long runs of tokens
with one composition need no stack: each adapter computes its own runs.

A cached stack is used until its fingerprint changes (`peftcore._util.fingerprint`). A stack may hold more adapters than
a batch uses, because making one takes several times as long as a decoding step: when requests come and go, a server
uses the stack that it has.

Shapes: n tokens, i in_features, o out_features, R sum of the ranks of all adapters, of all layers together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore._util.fingerprint import Fingerprint
from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.composition.route import Blocks, Mask, Run
from peftcore.kernels.low_rank import LowRankBranch

LONG_RUN = 64
"""Mean length (tokens) of a run with one composition from which each run is computed separately."""
MANY_ADAPTERS = 8
"""Adapters (count) from which products batched by adapter pay for sorting the rows."""
STACKS_PER_LAYER = 2
"""Cached stacks per layer (count): one for short prompts, one for the batch that is decoded."""
MOST_KEPT = 16
"""Adapters (count) up to which a new stack keeps those of the last one."""
MOST_UNUSED = 4
"""Adapters of a stack for each one that a batch uses; a larger stack is not used, because all of it is read."""


class Stacked(NamedTuple):
    """The stacked adapters of layers that read one input."""

    a: Tensor
    """(R, i)"""
    b: list[Tensor]
    """Bᵀ of each layer (R of that layer, o), scaled; multiplies faster at decoding than the transpose."""
    ranks: tuple[int, ...]
    """Rank of each adapter of each layer."""
    sizes: list[int]
    """R of each layer."""
    batched: list[tuple[Tensor, Tensor]]
    """(A by adapter (K, i, r), B by adapter (K, r, o)) of each layer, in the same memory; [] if ranks differ."""
    fingerprint: Fingerprint
    """Fingerprint of the adapters, taken before their weights were read."""

    def is_current(self) -> bool:
        """Return True if the weights have not changed since they were stacked."""
        return self.fingerprint.holds()


def stack(layers: Sequence[Sequence[Adapter]], dtype: torch.dtype) -> Stacked | None:
    """Return the stacked adapters of some layers.

    Args:
        layers: the adapters of each layer.
        dtype: the type of the stack.

    Returns:
        The stack. None if an adapter is not exactly two factors, or if several adapters are stacked and some value is
        not finite: 0 x NaN is NaN, so one broken adapter would spoil the rows of all others.
    """
    fingerprint = Fingerprint(adapter for adapters in layers for adapter in adapters)
    factors = [[_factors(adapter) for adapter in adapters] for adapters in layers]
    if not all(_is_plain(one) for by_layer in factors for one in by_layer):
        return None
    plain: list[list[LowRankBranch]] = factors  # type: ignore[assignment]
    ranks = tuple(len(one.a) for by_layer in plain for one in by_layer)
    a = torch.cat([one.a.to(dtype) for by_layer in plain for one in by_layer])
    b = [_scaled_b(by_layer).to(dtype) for by_layer in plain]
    if any(len(by_layer) > 1 for by_layer in plain) and not all(_is_finite(each) for each in (a, *b)):
        return None
    sizes = [sum(len(one.a) for one in by_layer) for by_layer in plain]
    same = all(len({len(one.a) for one in by_layer}) == 1 and len(by_layer) == len(plain[0]) for by_layer in plain)
    batched = zip(a.split(sizes), b, strict=True) if same else ()
    return Stacked(
        a,
        b,
        ranks,
        sizes,
        [(_by_adapter(own_a, len(plain[0])).mT, _by_adapter(own_b, len(plain[0]))) for own_a, own_b in batched],
        fingerprint,
    )


def _scaled_b(branches: Sequence[LowRankBranch]) -> Tensor:
    """Return the scaled Bᵀ (R, o) of a layer's adapters; one multiplication for all of them, if their s is the same."""
    first = branches[0].scaling
    if all(isinstance(one.scaling, int | float) and one.scaling == first for one in branches):
        b = torch.cat([one.b.T for one in branches])
        return b if first == 1 else b.mul_(first)
    return torch.cat([(one.b * one.scaling).T for one in branches])


def _is_finite(tensor: Tensor) -> bool:
    """Return True if no value is infinite or NaN, in one pass."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in tensor.aminmax())


def _by_adapter(rows: Tensor, count: int) -> Tensor:
    return rows.view(count, -1, rows.shape[1])


def can_be_stacked(adapters: Iterable[Adapter]) -> bool:
    """Return True if each adapter is exactly two factors."""
    return all(_is_plain(_factors(adapter)) for adapter in adapters)


def branches_by_name(adapters: Mapping[str, Adapter]) -> dict[str, LowRankBranch] | None:
    """Return {name: low-rank branch} of a layer's adapters; None if one of them is not exactly two factors."""
    branches = {name: _factors(adapter) for name, adapter in adapters.items()}
    return branches if all(_is_plain(one) for one in branches.values()) else None  # type: ignore[return-value]


def _factors(adapter: Adapter) -> LowRankBranch | None:
    """Return the factors of an adapter; None if it adds more than these."""
    return adapter.low_rank() if adapter.trained_bias is None else None


def _is_plain(one: LowRankBranch | None) -> bool:
    return one is not None and one.gain is None and not one.dropout


class StackSpec(NamedTuple):
    """The key of a cached stack: the adapters, and all else that the stack depends on."""

    dtype: torch.dtype
    """Type of the stack."""
    device: torch.device
    training: bool
    """True if the layers are in training mode, in which adapters may have dropout."""
    adapters: tuple[tuple[Adapter, ...], ...]
    """The adapters of each layer."""
    names: tuple[str, ...]
    """All their names."""


def current_stack(cache: dict[Any, Any], layer: Any, spec: StackSpec) -> Stacked | None:
    """Return the up-to-date stack for a specification, from the cache if possible.

    Args:
        cache: {layer: ((specification, stack), ...)}; changed by one assignment, because other threads read it.
        layer: the first layer of the stack.
        spec: what to stack.

    Returns:
        The stack; None if the adapters cannot be stacked.
    """
    entries = cache.get(layer, ())
    stacked = next((stacked for key, stacked in entries if key is spec or key == spec), None)
    if stacked is not None and stacked.is_current():
        return stacked
    stacked = stack(spec.adapters, spec.dtype)
    if stacked is not None and stacked.is_current():
        cache[layer] = ((spec, stacked), *[entry for entry in entries if entry[0] != spec][: STACKS_PER_LAYER - 1])
    return stacked


def names_with_kept(cache: Mapping[Any, Any], layer: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the adapters to stack for a batch: those of a cached stack if it holds all that are used.

    Args:
        cache: see `current_stack`.
        layer: the first layer of the stack.
        names: the adapters that the batch uses, sorted.

    Returns:
        Sorted names. `names` itself if the weights of cached stacks have changed, as in training.
    """
    used = set(names)
    current = [spec.names for spec, stacked in cache.get(layer, ()) if stacked.is_current()]
    for held in current:
        if used <= set(held) and len(held) <= MOST_UNUSED * len(names):
            return held
    room = min(MOST_KEPT, MOST_UNUSED * len(names)) - len(names)
    kept = [name for name in (current[0] if current else ()) if name not in used][: max(0, room)]
    return tuple(sorted([*names, *kept])) if kept else names


def outputs_by_run(
    x: Tensor, layers: Sequence[tuple[BaseWeight, Mapping[str, LowRankBranch]]], runs: Sequence[Run]
) -> list[Tensor]:
    """Return the outputs of layers with a common input, for long runs of tokens; each run has one composition.

    One product computes the base's output for all tokens. Each adapter then computes only the runs that use the
    adapter. The adapters' parameters are read in every call.

    Args:
        x: input (..., i), in the type in which the layers compute.
        layers: for each layer, the base weight and {name: low-rank branch} of its adapters.
        runs: the runs of tokens; together they cover all tokens of x.

    Returns:
        y (..., o) for each layer, with base and adapters.
    """
    flat = x.reshape(-1, x.shape[-1])
    ys = []
    for base, branches in layers:
        y = base.product(flat)
        for name, branch in branches.items():
            used = [(start, stop, weights[name]) for start, stop, weights in runs if weights.get(name)]
            if not used:
                continue
            a, b = branch.a.to(x.dtype), branch.b.to(x.dtype).T
            for start, stop, weight in used:
                h, scale = F.linear(flat[start:stop], a), weight * branch.scaling
                if isinstance(scale, Tensor):
                    y[start:stop].addmm_(h * scale, b)
                else:
                    y[start:stop].addmm_(h, b, alpha=scale)
        ys.append(y.view(*x.shape[:-1], y.shape[-1]))
    return ys


def batched_outputs(x: Tensor, bases: Sequence[BaseWeight], stacked: Stacked, blocks: Blocks) -> list[Tensor]:
    """Return y (..., o) of each layer for rows with one adapter or none.

    Args:
        x: input (..., i), in the type in which the layers compute.
        bases: the base weights of the layers.
        stacked: the adapters of the layers, perhaps in a wider type.
        blocks: the rows grouped by adapter.
    """
    flat = x.reshape(-1, x.shape[-1])
    by_adapter = blocks.grouped(flat).to(stacked.a.dtype)
    ys = []
    for base, (a, b) in zip(bases, stacked.batched, strict=True):
        y = base.product(x).flatten(0, -2)
        blocks.add_products(y, by_adapter.bmm(a), b)
        ys.append(y.view(*x.shape[:-1], y.shape[-1]))
    return ys


def stacked_outputs(x: Tensor, bases: Sequence[BaseWeight], stacked: Stacked, mask: Mask | None) -> list[Tensor]:
    """Return y (..., o) of each layer for their common input.

    Args:
        x: input (..., i).
        bases: the base weights of the layers.
        stacked: the adapters of the layers.
        mask: the weights of the adapters by row or token; None if every row uses every adapter with weight 1.
    """
    flat = x.reshape(-1, x.shape[-1])
    h = F.linear(flat, stacked.a)
    if mask is not None:
        h = mask.apply(h)
    parts = (h,) if len(bases) == 1 else h.split(stacked.sizes, 1)
    ys = [base.product(x).flatten(0, -2).addmm_(part, b) for base, part, b in zip(bases, parts, stacked.b, strict=True)]
    return ys if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
