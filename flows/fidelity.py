"""How far one model's predictions are from another's, at the positions where an answer is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flows.rows import Row
from flows.scoring import by_length
from peftcore.train import RightPaddingCollator, supervised_logits, supervised_positions


@dataclass(frozen=True)
class Fidelity:
    """kl: mean KL(reference || candidate), nats per token; top1_agreement: share of tokens with the same best guess."""

    kl: float
    top1_agreement: float
    tokens: int


@torch.no_grad()
def fidelity(
    reference: nn.Module, candidate: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None
) -> Fidelity:
    """Compare two models of one vocabulary at the supervised positions of `rows`. bar: moved on by rows."""
    collate = RightPaddingCollator(pad)
    device = next(reference.parameters()).device
    divergence, agreed, tokens = 0.0, 0, 0
    for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
        inputs: dict[str, Any] = {name: t.to(device) for name, t in collate([rows[i] for i in batch]).items()}
        mask = supervised_positions(inputs.pop("labels"))
        given = inputs | {"use_cache": False}
        p, q = (supervised_logits(m, given, mask).float().log_softmax(-1) for m in (reference, candidate))
        divergence += (p.exp() * (p - q)).sum(-1).double().sum().item()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
        if bar is not None:
            bar.update(len(batch))
    return Fidelity(divergence / tokens, agreed / tokens, tokens)
