"""How well a model predicts rows whose answers are known, and how near its own answers come to them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn

from flows.data.rows import Row
from peftcore.train import (
    ClassificationCollator,
    PairLogProbs,
    PreferenceCollator,
    RightPaddingCollator,
    pair_log_probs,
    row_sums,
    token_losses,
)


@dataclass(frozen=True)
class RowLosses:
    """Per row: mean loss (nats), tokens, and what the row weighs in the loss of all; None: as much as its tokens."""

    means: list[float]
    tokens: list[int]
    weighed: list[float] | None = None

    @property
    def weights(self) -> list[float]:
        """What each row weighs."""
        return [float(n) for n in self.tokens] if self.weighed is None else self.weighed

    @property
    def loss(self) -> float:
        """Weighted mean over the rows (nats), which is that over all tokens where a row weighs as much as it has.

        Not a number where all weigh nothing.
        """
        weight = sum(self.weights)
        return sum(m * w for m, w in zip(self.means, self.weights, strict=True)) / weight if weight else math.nan

    def of(self, indices: Sequence[int]) -> "RowLosses":
        """Those of some rows."""
        means, weights = ([column[i] for i in indices] for column in (self.means, self.weights))
        return RowLosses(means, [self.tokens[i] for i in indices], weights)

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
    """Losses of each row, which weighs its tokens times its own weight, if it has one. bar: moved on by rows.

    The output head runs at supervised positions only.
    """
    means, tokens = [0.0] * len(rows), [0] * len(rows)
    collate = RightPaddingCollator(pad)
    device = next(model.parameters()).device
    for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in batch]).items()}
        labels, _ = inputs.pop("labels"), inputs.pop("weight", None)
        sums, counts = row_sums(*token_losses(model, inputs | {"use_cache": False}, labels))
        for i, total, count in zip(batch, sums.tolist(), counts.tolist(), strict=True):
            means[i], tokens[i] = total / count, count
        if bar is not None:
            bar.update(len(batch))
    return RowLosses(means, tokens, [n * row.get("weight", 1.0) for n, row in zip(tokens, rows, strict=True)])


@torch.no_grad()
def pairs_log_probs(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None) -> PairLogProbs:
    """Of all pairs, in float64; batch_size: answers of a forward pass. bar: moved on by rows."""
    collate, device = PreferenceCollator(pad), next(model.parameters()).device
    columns = torch.zeros(4, len(rows), dtype=torch.float64)
    lengths = [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows]
    for batch in by_length(lengths, max(1, batch_size // 2)):
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in batch]).items()}
        found = pair_log_probs(model, inputs)
        parts = (found.chosen, found.rejected, found.chosen_tokens, found.rejected_tokens)
        columns[:, batch] = torch.stack([part.double().cpu() for part in parts])
        if bar is not None:
            bar.update(len(batch))
    return PairLogProbs(*columns)


@torch.no_grad()
def class_log_probs(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None) -> Tensor:
    """Log-probabilities (n, C) of the classes for each row, in float64 on the CPU. bar: moved on by rows."""
    collate, device = ClassificationCollator(pad), next(model.parameters()).device
    found: list[Tensor | None] = [None] * len(rows)
    for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
        given = collate([rows[i] for i in batch])
        inputs = {name: given[name].to(device) for name in ("input_ids", "attention_mask")}
        for i, log_probs in zip(batch, model(**inputs).logits.double().log_softmax(-1).cpu(), strict=True):
            found[i] = log_probs
        if bar is not None:
            bar.update(len(batch))
    return torch.stack([one for one in found if one is not None])


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-L of each answer, F-measure from 0 to 1: the longest common subsequence of lower-cased words."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [scorer.score(r, a)["rougeL"].fmeasure for r, a in zip(references, answers, strict=True)]
