"""Linear layers and their low-rank adapters as one operation: y = W x + b + s·B(A d(x)), d dropout.

Whatever method gives the factors, this is its fast path: the adapter's product is added onto the base's output in
place, the factors are cast to the type of the activations and never the reverse, dropout's mask is kept as bits, and
what else is kept for the backward is x and A d(x), nothing of the output's size. With a gain, y = g∘(W x + s·BA x), the
output before the gain is kept too.

Layers that read the same x go through it together: one product with all A stacked, one mask, and one buffer in which
x's gradient is summed up.

Shapes: n tokens, i in_features, o out_features, r rank, R the ranks of all layers together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.bases import BaseWeight
from peftcore.kernels.maths import scaled
from peftcore.kernels.seeded_dropout import Dropout, mask_, masked


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


class Factors(NamedTuple):
    """ΔW = s·BA of a layer, or of each of its e experts (1 for every other layer); i counts a kernel's size too."""

    a: Tensor
    """A (e, r, i)."""
    b: Tensor
    """B (e, o, r)."""
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def dense(self) -> Tensor:
        """ΔW (e, o, i)."""
        return self.scaling * self.b @ self.a


def low_rank_linears(x: Tensor, layers: Sequence[tuple[BaseWeight, LowRank]]) -> Sequence[Tensor]:
    """y (..., o) of each layer for their common x (..., i), of the type they compute in; all drop alike."""
    dropout = Dropout(layers[0][1].dropout) if layers[0][1].dropout else None
    scale = 1.0 if dropout is None else dropout.scale
    call = _Call([base for base, _ in layers], [own.scaling * scale for _, own in layers], dropout)
    if torch.is_grad_enabled():
        tensors = [t for base, own in layers for t in (own.a, own.b, own.gain, base.weight_for_backward())]
        ys: Any = _LowRankLinears.apply(x, call, *tensors)
    else:
        ys = _forward(x, call, [(own.a, own.b, own.gain) for _, own in layers]).outputs()
    # Shaped here, because models change projections in place, and autograd forbids it of views from a custom function.
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


class _Call(NamedTuple):
    """What of one call is no tensor that has a gradient."""

    bases: list[BaseWeight]
    scalings: list[float]
    """s of each layer, with dropout's scale in it, so that no large tensor has to be scaled."""
    dropout: Dropout | None


_Gained = tuple[Tensor, Tensor, Tensor | None]
"""A, B and gain of a layer."""


class _Forward(NamedTuple):
    h: Tensor
    """A d(x) (n, R) of all layers."""
    bits: Tensor | None
    """What dropout's mask comes back from."""
    a: Tensor
    """The stacked A (R, i) in the activations' type."""
    b: list[Tensor]
    """s·B of each layer in that type."""
    ys: list[Tensor]
    """(n, o), before the gain."""
    gains: list[Tensor | None]

    def outputs(self) -> tuple[Tensor, ...]:
        """y (n, o) of each layer."""
        return tuple(y if g is None else scaled(y, g) for y, g in zip(self.ys, self.gains, strict=True))


def _forward(x: Tensor, call: _Call, factors: list[_Gained]) -> _Forward:
    flat = x.reshape(-1, x.shape[-1])
    a = _stacked([a.to(x.dtype) for a, _, _ in factors], 0)
    keep, bits = (None, None) if call.dropout is None else call.dropout.draw(flat)
    h = F.linear(flat if keep is None else masked(flat, keep), a)
    scaled = [(b * s).to(x.dtype) for (_, b, _), s in zip(factors, call.scalings, strict=True)]
    parts = zip(call.bases, _parts(h, scaled), scaled, strict=True)
    ys = [base.product(flat).addmm_(own, b.T) for base, own, b in parts]
    return _Forward(h, bits, a, scaled, ys, [gain for _, _, gain in factors])


def _stacked(tensors: list[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def _parts(h: Tensor, b: list[Tensor]) -> Sequence[Tensor]:
    """Each layer's own columns of h (n, R)."""
    return (h,) if len(b) == 1 else h.split([each.shape[1] for each in b], 1)


class _LowRankLinears(torch.autograd.Function):
    """The ys from x and, of each layer, A, B, gain or None, and its weight or None where it is read again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        made = _forward(x, call, _factors(tensors))
        before_gain = [None if gain is None else y for y, gain in zip(made.ys, made.gains, strict=True)]
        ctx.call, ctx.count = call, len(made.ys)
        ctx.save_for_backward(x, made.h, made.bits, made.a, *tensors, *made.b, *before_gain)
        return made.outputs()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, h, bits, a, *others = ctx.saved_tensors
        call, count, needed = ctx.call, ctx.count, ctx.needs_input_grad
        tensors, b, before_gain = others[: 4 * count], others[4 * count : 5 * count], others[5 * count :]
        weights = [
            (base.read() if weight is None else weight).to(x.dtype)
            for base, weight in zip(call.bases, tensors[3::4], strict=True)
        ]
        flat = x.reshape(-1, x.shape[-1])
        keep = None if call.dropout is None else call.dropout.again(flat, bits)
        if torch.is_grad_enabled():  # for a second derivative, through operations that have one
            return _plain_gradients(x, keep, call, tensors, weights, gradients, needed)
        found: list[Tensor | None] = [None] * len(tensors)
        through_gain: list[Tensor] = []
        through_b: list[Tensor] = []
        for k, own in enumerate(_parts(h, b)):
            g = gradients[k]
            if (gain := tensors[4 * k + 2]) is not None:
                found[4 * k + 2] = (g * before_gain[k]).sum(0, dtype=gain.dtype)
                g = scaled(g, gain)
            through_b.append(g @ b[k])
            found[4 * k + 1] = (own.T @ g).mul_(call.scalings[k]).T.to(tensors[4 * k + 1].dtype)
            through_gain.append(g)
        g_h = _stacked(through_b, 1)
        g_a = (g_h.T @ (flat if keep is None else masked(flat, keep))).split([each.shape[1] for each in b])
        found[0::4] = [part.to(factor.dtype) for part, factor in zip(g_a, tensors[0::4], strict=True)]
        if not needed[0]:
            return None, None, *found
        g_x = g_h @ a if keep is None else mask_(g_h @ a, keep)
        for g, weight in zip(through_gain, weights, strict=True):
            g_x.addmm_(g, weight)
        return g_x.view(x.shape), None, *found


def _factors(tensors: Sequence[Any]) -> list[_Gained]:
    return list(zip(tensors[0::4], tensors[1::4], tensors[2::4], strict=True))


def _plain_gradients(
    x: Tensor,
    keep: Tensor | None,
    call: _Call,
    tensors: Sequence[Tensor | None],
    weights: list[Tensor],
    gradients: tuple[Tensor, ...],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs by plain autograd, which can be differentiated again."""
    flat = x.reshape(-1, x.shape[-1])
    dropped, outputs = flat if keep is None else masked(flat, keep), []
    for (a, b, gain), weight, scaling in zip(_factors(tensors), weights, call.scalings, strict=True):
        y = flat @ weight.T + scaling * dropped @ a.to(x.dtype).T @ b.to(x.dtype).T
        outputs.append(y if gain is None else scaled(y, gain))
    inputs = [x, None, *tensors]
    wanted = [tensor for tensor, wants in zip(inputs, needed, strict=True) if wants and tensor is not None]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return tuple(next(found) if wants else None for wants in needed)
