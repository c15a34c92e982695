"""Fidelity of one model's predictions to another's, at the supervised positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flows.data.rows import Row
from flows.evaluation.scoring import by_length, class_log_probs
from peftcore.train import RightPaddingCollator, supervised_logits, supervised_positions


@dataclass(frozen=True)
class Fidelity:
    """Means over tokens of a candidate's predictions against a reference's."""

    kl: float
    """KL(reference || candidate), nats per token."""
    top1_agreement: float
    """Share of tokens for which both models have the same most likely token."""
    loss: float
    """Loss of the candidate (nats per token)."""
    reference_loss: float
    """Loss of the reference (nats per token)."""
    tokens: int
    """Number of tokens."""

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f}, top-1 agreement {self.top1_agreement:.3f}, loss {self.loss:.4f} "
            f"({self.loss - self.reference_loss:+.4f}) over {self.tokens} tokens"
        )


@torch.no_grad()
def fidelity(
    reference: nn.Module, candidate: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None
) -> Fidelity:
    """Compare two models with one vocabulary at the supervised positions of `rows`. bar: progress bar in rows."""
    collate = RightPaddingCollator(pad)
    device = next(reference.parameters()).device
    divergence, agreed, tokens = 0.0, 0, 0
    losses = [0.0, 0.0]
    for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
        inputs: dict[str, Any] = {name: t.to(device) for name, t in collate([rows[i] for i in batch]).items()}
        labels = inputs.pop("labels")
        mask = supervised_positions(labels)
        answers = labels[:, 1:][mask[:, :-1], None]
        arguments = inputs | {"use_cache": False}
        p, q = (supervised_logits(m, arguments, mask).float().log_softmax(-1) for m in (reference, candidate))
        divergence += (p.exp() * (p - q)).sum(-1).double().sum().item()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        for k, predicted in enumerate((p, q)):
            losses[k] -= predicted.gather(1, answers).double().sum().item()
        tokens += len(p)
        if bar is not None:
            bar.update(len(batch))
    reference_loss, loss = (total / tokens for total in losses)
    return Fidelity(divergence / tokens, agreed / tokens, loss, reference_loss, tokens)


@torch.no_grad()
def class_fidelity(
    reference: nn.Module, candidate: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None
) -> Fidelity:
    """Compare two classifiers of the same classes on `rows`; each text counts as one token. bar: progress in rows."""
    p = class_log_probs(reference, rows, pad, batch_size)
    q = class_log_probs(candidate, rows, pad, batch_size, bar)
    labels = torch.tensor([row["label"] for row in rows])[:, None]
    reference_loss, loss = (-log_probs.gather(1, labels).mean().item() for log_probs in (p, q))
    divergence = (p.exp() * (p - q)).sum(1).mean().item()
    agreement = (p.argmax(1) == q.argmax(1)).double().mean().item()
    return Fidelity(divergence, agreement, loss, reference_loss, len(rows))
