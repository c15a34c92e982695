"""Divergences of a student's from a teacher's next-token distribution.

p: the teacher's distribution of a token. q: the student's. m = βp + (1 − β)q.

    forward_kl   KL(p ‖ q)                             the student covers all that the teacher may say
    reverse_kl   KL(q ‖ p)                             the student keeps to what the teacher would say
    jsd          β KL(p ‖ m) + (1 − β) KL(q ‖ m)       generalised Jensen-Shannon divergence, arXiv:2306.13649, eq. 1

Distributions are computed in float32 or wider, and in chunks of tokens that the backward pass computes again. So memory
holds the logits, and the distributions of one chunk.

Shapes: n tokens, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
CHUNK = 256
"""Tokens whose distributions are in memory together."""


def token_divergences(
    student: Tensor, teacher: Tensor, kind: Divergence = "forward_kl", temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Return the divergence of each token, (n,) in nats.

    Args:
        student: Logits (n, V).
        teacher: Logits (n, V') without gradients. If V and V' differ, the first min(V, V') tokens are compared, because
            models of one family pad one vocabulary to several sizes.
        kind: The divergence.
        temperature: Divisor of both logits, above 0.
        beta: Weight of the teacher in the mixture of `jsd`, between 0 and 1.
    """
    width = min(student.shape[1], teacher.shape[1])
    parts = [
        checkpoint(_divergences, one[:, :width], other[:, :width], kind, temperature, beta, use_reentrant=False)
        for one, other in zip(student.split(CHUNK), teacher.to(student.device).split(CHUNK), strict=True)
    ]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _divergences(student: Tensor, teacher: Tensor, kind: Divergence, temperature: float, beta: float) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q, log_p = ((logits.to(dtype) / temperature).log_softmax(-1) for logits in (student, teacher))
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    weights = torch.tensor([1 - beta, beta], dtype=dtype, device=log_q.device).log()
    log_m = torch.logaddexp(log_q + weights[0], log_p + weights[1])
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row; a token of probability 0 under p adds 0."""
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
