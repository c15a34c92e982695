"""Cross entropy of a linear output head without keeping logits: gradients are computed in the forward, by chunks.

    z = f(s (h Wᵀ + b)),  f(u) = c tanh(u / c) or u;   loss_i = log Σ_v exp z_iv − z_{i, y_i}
    ∂loss_i/∂h_i = s [(softmax(z_i) − 1_{y_i}) ∘ f'] W

h: hidden states. W, b: weight and bias of the head. s: logit scale. c: soft-cap. y: targets.

With a frozen head only this gradient (n, d) is kept, as in Liger Kernel (arXiv:2410.10989) and cut cross entropy
(arXiv:2411.09009); the backward multiplies row i by the upstream gradient of loss i. With a trained head the backward
computes each chunk's logits again, because W's gradient needs the upstream gradients.

Shapes: n rows, d hidden width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.bases import fast_dtype
from peftcore.errors import TrainingError

_CHUNK_ELEMENTS = 2**23
"""Logits (count) of one matrix product: with fewer rows, reading W would dominate the time."""
_CACHE_ELEMENTS = 2**21
"""Logits (count) that a CPU thread processes at once in all passes of the softmax: they fit into its caches, and
threads are rarely synchronised."""
_SMALLEST = 1e-30
"""Least probability whose logarithm is accurate in float32."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Return the cross entropies (n,) in nats, float32 or wider. Differentiable once.

    Args:
        hidden: (n, d), in the dtype of `weight`. Autocast casts both as for a linear layer.
        weight: (V, d).
        targets: (n,) token ids.
        bias: (V,), or None.
        softcap: Bound c of the soft-cap. None: no soft-cap.
        scale: Factor of the logits, applied before the soft-cap.
        chunk: Rows (count) whose logits exist at a time. None: about 2^23 logits.

    Raises:
        TrainingError: Shapes do not fit, a target is not a token id, or `create_graph` is used in the backward.
    """
    _check(hidden, weight, targets, bias, softcap, chunk)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (
            x if x is None or x.dtype in (dtype, torch.float64) else x.to(dtype) for x in (hidden, weight, bias)
        )  # type: ignore[assignment]
    rows = chunk or max(1, _CHUNK_ELEMENTS // len(weight))
    parts = max(1, -(-len(hidden) // rows))
    work = _Work(softcap, scale, -(-len(hidden) // parts), targets.to(torch.int64))
    with torch.autocast(hidden.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return work.losses(hidden, weight, bias)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return _TrainedHead.apply(hidden, weight, bias, work)
        if hidden.requires_grad:
            return _FrozenHead.apply(hidden, weight, bias, work)
        return work.losses(hidden, weight, bias)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, chunk: int | None
) -> None:
    n, vocabulary = len(hidden), len(weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise TrainingError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit; give (n, d) and (V, d)"
        )
    if targets.shape != (n,) or targets.is_floating_point() or targets.is_complex():
        raise TrainingError(
            f"targets are {tuple(targets.shape)} {targets.dtype}; give one token id (an integer) per row: ({n},)"
        )
    if bias is not None and bias.shape != (vocabulary,):
        raise TrainingError(f"the bias has shape {tuple(bias.shape)}; it must be ({vocabulary},), one value per token")
    if (softcap is not None and softcap <= 0) or (chunk is not None and chunk < 1):
        raise TrainingError(f"softcap={softcap}, chunk={chunk}: both must be positive or None")
    least, most = (int(targets.min()), int(targets.max())) if n else (0, 0)
    if least < 0 or most >= vocabulary > 0:
        raise TrainingError(
            f"targets range from {least} to {most}, token ids from 0 to {vocabulary - 1}; remove rows without a label, "
            "and check that tokenizer and model belong together"
        )


def _mm(one: Tensor, two: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write one · two + bias into `out`; where 16 bits are slow, computed in float32 and rounded to `out`'s type."""
    dtype = fast_dtype(out.dtype, out.device)
    if dtype != out.dtype:
        wide = torch.mm(one.to(dtype), two.to(dtype))
        return out.copy_(wide if bias is None else wide.add_(bias))
    return torch.mm(one, two, out=out) if bias is None else torch.addmm(bias, one, two, out=out)


@dataclass(frozen=True)
class _Work:
    """Options of one call, and its loops over chunks."""

    softcap: float | None
    scale: float
    chunk: int
    targets: Tensor

    def losses(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None = None) -> Tensor:
        """Return losses (n,); write their gradients w.r.t. `hidden` into `grad` (n, d) if given."""
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, logits in self._chunks(hidden, weight, bias):
            self._softmax(logits, self.targets[part], losses[part], keep=grad is not None)
            if grad is not None:
                _mm(logits, weight, grad[part])
        if grad is not None and self.scale != 1:
            grad.mul_(self.scale)
        return losses

    def backward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of Σ upstream_i loss_i w.r.t. hidden, weight and bias, None if not `needed`."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        grads = [
            torch.zeros_like(x, dtype=dtype) if need and x is not None else None
            for x, dtype, need in zip((hidden, weight, bias), (hidden.dtype, wide, wide), needed, strict=True)
        ]
        scratch = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, logits in self._chunks(hidden, weight, bias):
            self._softmax(logits, self.targets[part], scratch[part], keep=True)
            logits.mul_((upstream[part] * self.scale).unsqueeze(1))
            if grads[0] is not None:
                _mm(logits, weight, grads[0][part])
            if grads[1] is not None:
                grads[1].add_(_mm(logits.t(), hidden[part], torch.empty_like(weight)))
            if grads[2] is not None:
                grads[2].add_(logits.sum(0, dtype=wide))
        return tuple(
            None if grad is None or x is None else grad.to(x.dtype)
            for grad, x in zip(grads, (hidden, weight, bias), strict=True)
        )

    def _chunks(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, raw logits) of each chunk; all chunks share one buffer of logits."""
        buffer = hidden.new_empty(self.chunk, len(weight))
        for start in range(0, len(hidden), max(1, self.chunk)):
            part = slice(start, min(start + self.chunk, len(hidden)))
            logits = buffer[: part.stop - start]
            yield part, _mm(hidden[part], weight.t(), logits, bias)

    def _softmax(self, logits: Tensor, targets: Tensor, losses: Tensor, keep: bool) -> None:
        """Write the losses of some rows; if `keep`, overwrite their raw logits with the gradient w.r.t. the logits."""
        count, vocabulary = logits.shape
        if logits.device.type == "cpu":
            count = min(count, max(1, _CACHE_ELEMENTS * torch.get_num_threads() // vocabulary))
        buffers = logits.new_empty(2, count, vocabulary, dtype=losses.dtype)
        for start in range(0, len(logits), count):
            part = slice(start, min(start + count, len(logits)))
            z, p = buffers[:, : part.stop - start]
            z.copy_(logits[part])
            if self.scale != 1:
                z.mul_(self.scale)
            if self.softcap is not None:
                z.div_(self.softcap).tanh_().mul_(self.softcap)
            torch.softmax(z, 1, out=p)
            target = targets[part].unsqueeze(1)
            loss = self._loss(z, p, target)
            losses[part] = loss.squeeze(1)
            if not keep:
                continue
            p.scatter_(1, target, (-loss).expm1())  # p - 1 without cancellation if p is near 1
            if self.softcap is not None:
                p.mul_(z.div_(self.softcap).square_().neg_().add_(1))  # f' = 1 - tanh²
            logits[part] = p

    def _loss(self, logits: Tensor, probabilities: Tensor, target: Tensor) -> Tensor:
        """Return -log p of the targets (n, 1), accurate for any p."""
        likely = probabilities.gather(1, target)
        if likely.device.type == "cpu" and bool((likely > _SMALLEST).all()):
            return likely.log_().neg_().clamp_(min=0)
        # The largest probability is 1 / Σ exp(z - max), from which the log-sum-exp follows.
        log_sum = logits.amax(1, True) - probabilities.amax(1, True).log()
        return (log_sum - logits.gather(1, target)).clamp_(min=0)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> Tensor:
        grad = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        losses = work.losses(hidden, weight, bias, grad)
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _check_differentiated_once()
        (grad,) = ctx.saved_tensors
        # float32 upstream gradients: rounding them would give every row the same error, a bias
        return (grad * upstream[0].unsqueeze(1)).to(grad.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.work = work
        return work.losses(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _check_differentiated_once()
        with torch.autocast(upstream[0].device.type, enabled=False):
            return *ctx.work.backward(*ctx.saved_tensors, upstream[0], ctx.needs_input_grad[:3]), None


def _check_differentiated_once() -> None:
    if torch.is_grad_enabled():  # the computed gradient would be treated as a constant
        raise TrainingError(
            "linear_cross_entropy is differentiable once; leave out create_graph, or take the cross entropy of logits"
        )
