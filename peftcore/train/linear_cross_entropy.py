"""Cross entropy of a linear output head, without the logits: the gradient is formed in the forward, chunk by chunk.

    z = f(s (h Wᵀ + b)),  f(u) = c tanh(u / c) or u;   loss_i = log Σ_v exp z_iv − z_{i, y_i}
    ∂loss_i/∂h_i = s [(softmax(z_i) − 1_{y_i}) ∘ f'] W

With a frozen head that gradient (n, d) is all that is kept, as Liger Kernel (arXiv:2410.10989) and cut cross entropy
(arXiv:2411.09009) do it; the backward multiplies row i by the upstream gradient of loss i. With a trained head the
backward forms each chunk's logits once more, because W's gradient needs the upstream gradients.

Shapes: n rows, d hidden width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import TrainingError

_CHUNK_ELEMENTS = 2**23
"""Logits (count) of one matrix product: enough rows that reading W does not dominate it."""
_CACHE_ELEMENTS = 2**21
"""Logits (count) a CPU thread takes through all passes of the softmax at once: few enough to stay in its caches, and
enough that threads wait for each other rarely."""
_SMALLEST = 1e-30
"""A probability well above where float32 loses digits."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Losses (n,) in nats, float32 or wider, of predicting `targets` (n,) from the logits of `hidden` (n, d).

    weight: (V, d); bias: (V,) or None; scale: what the logits are multiplied with, before they are soft-capped at
    ±softcap. chunk: rows (count) whose logits exist at a time; by default about 2^23 logits.
    hidden and weight have one dtype, except under autocast, which casts them as it does for a linear layer.
    Differentiable once. TrainingError where shapes do not fit, a target is no token, or create_graph is asked for.
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
            f"targets are {tuple(targets.shape)} {targets.dtype}; give one token id (an integer) a row: ({n},)"
        )
    if bias is not None and bias.shape != (vocabulary,):
        raise TrainingError(f"the bias is {tuple(bias.shape)}; one for each of {vocabulary} tokens fits")
    if (softcap is not None and softcap <= 0) or (chunk is not None and chunk < 1):
        raise TrainingError(f"softcap={softcap}, chunk={chunk}: leave them out, or give positive numbers")
    least, most = (int(targets.min()), int(targets.max())) if n else (0, 0)
    if least < 0 or most >= vocabulary > 0:
        raise TrainingError(
            f"targets run from {least} to {most}, tokens from 0 to {vocabulary - 1}; drop the rows that nobody "
            "supervises, and check that the tokenizer is the model's"
        )


@dataclass(frozen=True)
class _Work:
    """One call's numbers, and its walks over chunks."""

    softcap: float | None
    scale: float
    chunk: int
    targets: Tensor

    def losses(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None = None) -> Tensor:
        """Losses (n,); their gradients w.r.t. `hidden` are written into `grad` (n, d) if it is given."""
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, logits in self._chunks(hidden, weight, bias):
            self._softmax(logits, self.targets[part], losses[part], keep=grad is not None)
            if grad is not None:
                torch.mm(logits, weight, out=grad[part])
        if grad is not None and self.scale != 1:
            grad.mul_(self.scale)
        return losses

    def backward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of Σ upstream_i loss_i w.r.t. hidden, weight and bias where `needed`; logits are formed again."""
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
                torch.mm(logits, weight, out=grads[0][part])
            if grads[1] is not None:
                grads[1].add_(torch.mm(logits.t(), hidden[part]))
            if grads[2] is not None:
                grads[2].add_(logits.sum(0, dtype=wide))
        return tuple(
            None if grad is None or x is None else grad.to(x.dtype)
            for grad, x in zip(grads, (hidden, weight, bias), strict=True)
        )

    def _chunks(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their raw logits), the logits in one buffer that is used again for every chunk."""
        buffer = hidden.new_empty(self.chunk, len(weight))
        for start in range(0, len(hidden), max(1, self.chunk)):
            part = slice(start, min(start + self.chunk, len(hidden)))
            logits = buffer[: part.stop - start]
            if bias is None:
                torch.mm(hidden[part], weight.t(), out=logits)
            else:
                torch.addmm(bias, hidden[part], weight.t(), out=logits)
            yield part, logits

    def _softmax(self, logits: Tensor, targets: Tensor, losses: Tensor, keep: bool) -> None:
        """Write the losses of some rows, and over their raw logits the gradient w.r.t. these if it is to be kept."""
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
            p.scatter_(1, target, (-loss).expm1())  # p - 1 without cancellation, for tokens that are nearly sure
            if self.softcap is not None:
                p.mul_(z.div_(self.softcap).square_().neg_().add_(1))  # f' = 1 - tanh²
            logits[part] = p

    def _loss(self, logits: Tensor, probabilities: Tensor, target: Tensor) -> Tensor:
        """-log p of the targets (n, 1), for any of them."""
        likely = probabilities.gather(1, target)
        if likely.device.type == "cpu" and bool((likely > _SMALLEST).all()):
            return likely.log_().neg_().clamp_(min=0)
        # The largest probability is 1 / Σ exp(z - max), so the softmax gives the log-sum-exp as well.
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
        # float32 upstream: its own rounding would be the same in every row, and so no noise but a bias
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
    if torch.is_grad_enabled():  # the gradient would pass for a constant
        raise TrainingError(
            "linear_cross_entropy is differentiable once; leave create_graph out, or compute the logits and take "
            "their cross entropy"
        )
