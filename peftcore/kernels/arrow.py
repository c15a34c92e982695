"""Arrow: weights of low-rank adapters for each token, without training. arXiv:2405.11157.

The prototype p of an adapter is the first right singular vector of its ΔW = BA. A token's weights are a softmax over
the k largest |⟨x, p⟩|, divided by a temperature; the other adapters get the weight 0.

Shapes: i in_features, o out_features, r rank, m adapters; A (r, i), B (o, r), p (i,).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.kernels.factors import Factors, svd_of_factors
from peftcore.kernels.maths import widened

ITERATIONS = 15
"""Steps of HF PEFT's power iteration (count)."""
_SMALL = 1e-8


def prototype(a: Tensor, b: Tensor) -> Tensor:
    """Return the first right singular vector (i,) of BA, in float32 or float64, without forming BA."""
    return svd_of_factors(Factors(widened(a)[None], widened(b)[None]), 1).vh[0, 0]


def iterated_prototype(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Return HF PEFT's estimate of the first right singular vector (i,) of BA: a power iteration in float32.

    Args:
        a: A (r, i).
        b: B (o, r).
        start: the vector (i,) at which the iteration starts.
    """
    wide_a, wide_b = a.float(), b.float()
    gram = wide_b.T @ wide_b
    direction = _unit(start.to(wide_a))
    for _ in range(ITERATIONS):
        direction = _unit(wide_a.T @ (gram @ (wide_a @ direction)))
    return direction.to(a.dtype)


def _unit(vector: Tensor) -> Tensor:
    return vector / (vector.norm() + _SMALL)


def token_weights(x: Tensor, prototypes: Tensor, top_k: int, temperature: float) -> Tensor:
    """Return the weights (..., m) of m adapters for each token, in x's dtype.

    Args:
        x: the layer's input (..., i).
        prototypes: p of each adapter (m, i).
        top_k: adapters per token (count); m or more: all.
        temperature: divisor of the scores before the softmax.
    """
    scores = (x.to(prototypes.dtype) @ prototypes.T).abs()
    if top_k < len(prototypes):
        best, indices = scores.topk(top_k, dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, indices, best)
    return F.softmax(scores / temperature, dim=-1).to(x.dtype)
