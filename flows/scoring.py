"""How well a model predicts rows whose answers are known, and how near its own answers come to them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import nn

from flows.rows import Row
from peftcore.train import RightPaddingCollator, row_sums, token_losses


@dataclass(frozen=True)
class RowLosses:
    """Per row: mean loss (nats per supervised token) and how many tokens that is of."""

    means: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """Mean over the tokens of all rows (nats)."""
        return sum(m * n for m, n in zip(self.means, self.tokens, strict=True)) / sum(self.tokens)

    def of(self, indices: Sequence[int]) -> "RowLosses":
        """Those of some rows."""
        return RowLosses([self.means[i] for i in indices], [self.tokens[i] for i in indices])

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of rows in batches of like length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None) -> RowLosses:
    """Losses of each row; the output head runs at supervised positions only. bar: moved on by rows."""
    means, tokens = [0.0] * len(rows), [0] * len(rows)
    collate = RightPaddingCollator(pad)
    device = next(model.parameters()).device
    for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in batch]).items()}
        labels = inputs.pop("labels")
        sums, counts = row_sums(*token_losses(model, inputs | {"use_cache": False}, labels))
        for i, total, count in zip(batch, sums.tolist(), counts.tolist(), strict=True):
            means[i], tokens[i] = total / count, count
        if bar is not None:
            bar.update(len(batch))
    return RowLosses(means, tokens)


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-L of each answer, F-measure from 0 to 1: the longest common subsequence of lower-cased words."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [scorer.score(r, a)["rougeL"].fmeasure for r, a in zip(references, answers, strict=True)]
