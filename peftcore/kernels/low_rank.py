"""Fused forward of linear layers with a low-rank adapter: y = W x + b + s·B(A d(x)), d dropout.

This is the fast path of every method whose forward is a low-rank branch:
- The adapter's product is added to the base's output in place.
- The factors are cast to the type of the activations, never the reverse.
- The backward pass needs x, A d(x) and the dropout mask as bits; nothing of the output's size is saved. Only with a
  gain, y = g∘(W x + s·BA x), the output before the gain is saved too.

Layers with a common input x are computed together: one product with all A stacked, one dropout mask, and one buffer for
the gradient of x.

On a CPU without fast products in 16 bits, all products are computed in float32, and the outputs rounded once.

Shapes: n tokens, i in_features, o out_features, r rank, R sum of the ranks of all layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.bases import BaseWeight, fast_dtype
from peftcore.compiled.dropout import DropoutMask
from peftcore.kernels.dropout_masks import get_dropout_masks
from peftcore.kernels.maths import scaled
from peftcore.kernels.pytorch_dropout import PytorchDropout
from peftcore.kernels.seeded_dropout import Dropout


class LowRankBranch(NamedTuple):
    """The low-rank branch of one forward pass: y = g∘(W x + s·B(A d(x))), d dropout, g gain.

    For the fixed weight change of an adapter, see `peftcore.kernels.factors.Factors`.
    """

    a: Tensor
    """A (r, i), of any floating type."""
    b: Tensor
    """B (o, r)."""
    scaling: Any
    """s: a number, or a tensor without dimensions."""
    dropout: float = 0.0
    """Probability of dropping an element of the input in this forward pass."""
    gain: Tensor | None = None
    """g (o,); requires dropout 0 and a layer without bias."""


def low_rank_linears(x: Tensor, layers: Sequence[tuple[BaseWeight, LowRankBranch]]) -> Sequence[Tensor]:
    """Compute several adapted linear layers for their common input.

    Args:
        x: input (..., i), in the type in which the layers compute.
        layers: (base weight, low-rank branch) of each layer; all branches have the same dropout probability, and share
            one mask.

    Returns:
        Output (..., o) of each layer.
    """
    dropout = _new_mask(layers[0][1].dropout) if layers[0][1].dropout else None
    scale = 1.0 if dropout is None else dropout.scale
    call = _Call([base for base, _ in layers], [branch.scaling * scale for _, branch in layers], dropout)
    if torch.is_grad_enabled():
        tensors = [t for base, branch in layers for t in (branch.a, branch.b, branch.gain, base.weight_for_backward())]
        ys: Any = _LowRankLinears.apply(x, call, *tensors)
    else:
        ys = _forward(x, call, [(branch.a, branch.b, branch.gain) for _, branch in layers]).outputs()
    # reshaped outside of the custom function: models change outputs in place, which autograd forbids for its views
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _new_mask(p: float) -> Dropout | PytorchDropout:
    return Dropout(p) if get_dropout_masks() == "fast" else PytorchDropout(p)


class _Call(NamedTuple):
    """Arguments of one call that have no gradient."""

    bases: list[BaseWeight]
    scalings: list[Any]
    """s of each layer times dropout's scale, so that no large tensor has to be scaled."""
    dropout: Dropout | PytorchDropout | None


_Branch = tuple[Tensor, Tensor, Tensor | None]
"""A, B and gain of a layer."""


class _Forward(NamedTuple):
    """Results of the forward pass, for the outputs and for the backward pass."""

    h: Tensor
    """A d(x) (n, R) of all layers."""
    bits: Tensor | None
    """The dropout mask as saved for the backward pass; None if a seed restores it."""
    a: Tensor
    """Stacked A (R, i) in the type of the products."""
    b: list[Tensor]
    """s·B of each layer in the same type."""
    ys: list[Tensor]
    """(n, o) in the type of the activations, before the gain."""
    gains: list[Tensor | None]

    def outputs(self) -> tuple[Tensor, ...]:
        """Return y (n, o) of each layer."""
        return tuple(y if g is None else scaled(y, g) for y, g in zip(self.ys, self.gains, strict=True))


def _forward(x: Tensor, call: _Call, branches: list[_Branch]) -> _Forward:
    dtype = _product_dtype(x, call)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    a = _stacked([a.to(dtype) for a, _, _ in branches], 0)
    mask, bits = (None, None) if call.dropout is None else call.dropout.draw(flat)
    h = F.linear(flat if mask is None else mask.apply(flat), a)
    scaled_b = [(b * s).to(dtype) for (_, b, _), s in zip(branches, call.scalings, strict=True)]
    parts = zip(call.bases, _parts(h, scaled_b), scaled_b, strict=True)
    ys = [base.product(flat).addmm_(part, b.T).to(x.dtype) for base, part, b in parts]
    return _Forward(h, bits, a, scaled_b, ys, [gain for _, _, gain in branches])


def _product_dtype(x: Tensor, call: _Call) -> torch.dtype:
    """Return the type in which products are computed: that of x, or float32 where that is several times faster.

    Inside of autocast it is that of x, because autocast would cast the products back.
    """
    dtype = fast_dtype(x.dtype, x.device)
    if dtype != x.dtype and (torch.is_autocast_enabled(x.device.type) or not _take_any_dtype(call)):
        return x.dtype
    return dtype


def _take_any_dtype(call: _Call) -> bool:
    return all(base.product_takes_any_dtype for base in call.bases)


def _stacked(tensors: list[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def _parts(h: Tensor, b: list[Tensor]) -> Sequence[Tensor]:
    """Split h (n, R) into the columns of each layer."""
    return (h,) if len(b) == 1 else h.split([each.shape[1] for each in b], 1)


class _LowRankLinears(torch.autograd.Function):
    """Autograd function of the outputs.

    Inputs: x, and for each layer A, B, the gain or None, and the weight, or None if the backward pass reads it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        result = _forward(x, call, _branches(tensors))
        before_gain = [None if gain is None else y for y, gain in zip(result.ys, result.gains, strict=True)]
        ctx.call, ctx.count = call, len(result.ys)
        ctx.save_for_backward(x, result.h, result.bits, result.a, *tensors, *result.b, *before_gain)
        return result.outputs()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, h, bits, a, *others = ctx.saved_tensors
        call, count, needed = ctx.call, ctx.count, ctx.needs_input_grad
        double = torch.is_grad_enabled()  # double backward (create_graph=True)
        dtype = x.dtype if double else a.dtype  # that of the forward's products
        tensors, b, before_gain = others[: 4 * count], others[4 * count : 5 * count], others[5 * count :]
        weights = [
            (base.read() if weight is None else weight).to(dtype)
            for base, weight in zip(call.bases, tensors[3::4], strict=True)
        ]
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        mask = None if call.dropout is None else call.dropout.again(flat, bits)
        if double:
            return _plain_gradients(x, mask, call, tensors, weights, gradients, needed)
        grads: list[Tensor | None] = [None] * len(tensors)
        through_gain: list[Tensor] = []
        through_b: list[Tensor] = []
        for k, part in enumerate(_parts(h, b)):
            g = gradients[k].to(dtype)
            if (gain := tensors[4 * k + 2]) is not None:
                grads[4 * k + 2] = (g * before_gain[k]).sum(0, dtype=gain.dtype)
                g = scaled(g, gain)
            through_b.append(g @ b[k])
            grads[4 * k + 1] = (part.T @ g).mul_(call.scalings[k]).T.to(tensors[4 * k + 1].dtype)
            through_gain.append(g)
        g_h = _stacked(through_b, 1)
        g_a = (g_h.T @ (flat if mask is None else mask.apply(flat))).split([each.shape[1] for each in b])
        grads[0::4] = [grad.to(factor.dtype) for grad, factor in zip(g_a, tensors[0::4], strict=True)]
        if not needed[0]:
            return None, None, *grads
        g_x = g_h @ a if mask is None else mask.apply_(g_h @ a)
        for g, weight in zip(through_gain, weights, strict=True):
            g_x.addmm_(g, weight)
        return g_x.to(x.dtype).view(x.shape), None, *grads


def _branches(tensors: Sequence[Any]) -> list[_Branch]:
    return list(zip(tensors[0::4], tensors[1::4], tensors[2::4], strict=True))


def _plain_gradients(
    x: Tensor,
    mask: DropoutMask | None,
    call: _Call,
    tensors: Sequence[Tensor | None],
    weights: list[Tensor],
    gradients: tuple[Tensor, ...],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs by plain autograd, which can be differentiated again."""
    flat = x.reshape(-1, x.shape[-1])
    dropped, outputs = flat if mask is None else mask.apply(flat), []
    for (a, b, gain), weight, scaling in zip(_branches(tensors), weights, call.scalings, strict=True):
        y = flat @ weight.T + scaling * dropped @ a.to(x.dtype).T @ b.to(x.dtype).T
        outputs.append(y if gain is None else scaled(y, gain))
    inputs = [x, None, *tensors]
    wanted = [tensor for tensor, wants in zip(inputs, needed, strict=True) if wants and tensor is not None]
    grads = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return tuple(next(grads) if wants else None for wants in needed)
