"""A linear layer and its low-rank adapter as one operation: y = W x + b + s·B(A d(x)), d dropout.

Whatever method gives the factors, this is its fast path: the adapter's product is added onto the base's output in
place, the factors are cast to the type of the activations and never the reverse, dropout comes back from a seed, and
what is kept for the backward is x and A d(x), nothing of the output's size. With a gain, y = g∘(W x + s·BA x), the
output before the gain is kept too.

Layers that read the same x share the first of these products: one GEMM for the stacked A, and one for its gradient.

Shapes: n tokens, i in_features, o out_features, r rank, R the ranks of all who share x together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.bases import BaseWeight
from peftcore.seeded_dropout import keep_mask, keep_scale, masked, new_seed


class LowRank(NamedTuple):
    """What an adapter computes, as two factors."""

    a: Tensor
    """A (r, i), of any floating type."""
    b: Tensor
    """B (o, r)."""
    scaling: float
    dropout: float = 0.0
    """Probability of dropping an element of the input in this forward."""
    gain: Tensor | None = None
    """g (o,); not with dropout, nor on a layer with bias."""


def low_rank_linear(
    base: BaseWeight, x: Tensor, own: LowRank, sharing: Sequence[LowRank] = ()
) -> tuple[Tensor, list[Tensor]]:
    """y (..., o) for x (..., i); and A d(x) (n, r) of each of those sharing x, for `low_rank_linear_after`."""
    stacked = torch.cat([own.a, *(each.a for each in sharing)]) if sharing else own.a
    call = _Call(base, own, new_seed() if own.dropout else None)
    y, others = _run(x, None, stacked, own.b, own.gain, call)
    return y, list(others.split([len(each.a) for each in sharing], 1)) if sharing else []


def low_rank_linear_after(base: BaseWeight, x: Tensor, h: Tensor, own: LowRank) -> Tensor:
    """y (..., o) where another layer has made h = A d(x) (n, r) already."""
    return _run(x, h, None, own.b, own.gain, _Call(base, own, None))[0]


class _Call(NamedTuple):
    """What of one call is no tensor that has a gradient."""

    base: BaseWeight
    own: LowRank
    seed: int | None

    @property
    def scaling(self) -> float:
        """s with dropout's scale in it, so that no tensor has to be scaled."""
        return self.own.scaling * keep_scale(self.own.dropout) if self.own.dropout else self.own.scaling

    def keep(self, flat: Tensor) -> Tensor | None:
        """Dropout's mask for the input (n, i)."""
        return None if self.seed is None else keep_mask(flat.shape, self.own.dropout, self.seed, flat.device)


def _run(
    x: Tensor, h: Tensor | None, a: Tensor | None, b: Tensor, gain: Tensor | None, call: _Call
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        return _LowRankLinear.apply(x, h, a, b, gain, call.base.weight_to_keep(), call)  # type: ignore[return-value]
    _, others, y = _forward(x, h, a, b, call)
    y = y if gain is None else y * gain.to(y.dtype)
    return y.view(*x.shape[:-1], y.shape[-1]), others


def _forward(x: Tensor, h: Tensor | None, a: Tensor | None, b: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Own A d(x) (n, r), that of others, and the output (n, o) before its gain."""
    flat, rank = x.reshape(-1, x.shape[-1]), b.shape[1]
    if a is None:
        assert h is not None
        own, others = h, h.new_empty(len(h), 0)
    else:
        every = F.linear(_dropped(flat, call.keep(flat)), a.to(x.dtype))
        own, others = every if len(a) == rank else every[:, :rank], every[:, rank:]
    y = call.base.product(flat)
    return own, others, y.addmm_(own, b.to(y.dtype).T, alpha=call.scaling)


class _LowRankLinear(torch.autograd.Function):
    """(y, the h of others) from x and either the stacked A (R, i), own rows first, or this layer's h (n, r)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        a: Tensor | None,
        b: Tensor,
        gain: Tensor | None,
        weight: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, Tensor]:
        own, others, y = _forward(x, h, a, b, call)
        ctx.call = call
        ctx.save_for_backward(x, h, a, b, gain, weight, own if h is None else None, None if gain is None else y)
        y = y if gain is None else y * gain.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1]), others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, h, a, b, gain, weight, own, before_gain = ctx.saved_tensors
        call, needed = ctx.call, ctx.needs_input_grad
        weight = (call.base.read() if weight is None else weight).to(x.dtype)
        if torch.is_grad_enabled():  # for a second derivative, through operations that have one
            return *_plain_gradients((x, h, a, b, gain), weight, call, gradients, needed), None, None
        g, g_others = gradients
        g, flat = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        g_gain = g_a = g_x = None
        if gain is not None:
            g_gain = (g * before_gain).sum(0, dtype=gain.dtype)
            g = g * gain.to(g.dtype)
        g_h = (g @ b.to(g.dtype)).mul_(call.scaling)
        g_b = (g.T @ (own if h is None else h)).mul_(call.scaling).to(b.dtype)
        if needed[0]:
            g_x = g @ weight
        if a is None:
            return _shaped(g_x, x), g_h, None, g_b, g_gain, None, None
        if g_others.shape[1]:
            g_h = torch.cat([g_h, g_others], 1)
        keep = call.keep(flat)
        if needed[2]:
            g_a = (g_h.T @ _dropped(flat, keep)).to(a.dtype)
        if g_x is not None and keep is None:
            g_x.addmm_(g_h, a.to(g.dtype))
        elif g_x is not None:
            g_x.add_(_dropped(g_h @ a.to(g.dtype), keep))
        return _shaped(g_x, x), None, g_a, g_b, g_gain, None, None


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else masked(x, keep)


def _shaped(gradient: Tensor | None, x: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.view(x.shape)


def _plain_gradients(
    inputs: tuple[Tensor | None, ...],
    weight: Tensor,
    call: _Call,
    gradients: tuple[Tensor, ...],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `inputs` by plain autograd, which can be differentiated again."""
    x, h, a, b, gain = inputs
    assert x is not None and b is not None
    rank, flat = b.shape[1], x.reshape(-1, x.shape[-1])
    every = h if h is not None else _dropped(flat, call.keep(flat)) @ a.to(x.dtype).T  # type: ignore[union-attr]
    y = flat @ weight.T + call.scaling * every[:, :rank] @ b.to(x.dtype).T
    y = y if gain is None else y * gain.to(y.dtype)
    outputs = (y.view(*x.shape[:-1], y.shape[-1]), every[:, rank:])
    wanted = [t for t, wants in zip(inputs, needed, strict=False) if wants]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))  # type: ignore[arg-type]
    return [next(found) if wants else None for wants in needed[: len(inputs)]]
