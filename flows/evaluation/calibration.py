"""Calibration: does a prediction with probability p come true in a share p of the cases?

Expected calibration error (ECE; Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599) with bins of
equal width, over the confidence c = max_k p_k of each prediction:

    ECE = sum_b |B_b| / n * |accuracy(B_b) - mean confidence(B_b)|

Brier score (Brier, 1950) over all classes, 0 (best) to 2: mean of sum_k (p_k - y_k)^2. A prediction is a class of a
text, or the next token at a supervised position.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flows.data.rows import Row
from flows.evaluation.scoring import by_length
from peftcore.train import RightPaddingCollator

BINS = 15


class Calibration:
    """Sums over predictions, from which the figures follow; `add` takes them in batches."""

    def __init__(self) -> None:
        self._count, self._correct, self._confidence = (torch.zeros(BINS, dtype=torch.float64) for _ in range(3))
        self._brier = 0.0

    def add(self, log_probs: Tensor, labels: Tensor) -> None:
        """Add predictions.

        Args:
            log_probs: Log-probabilities (n, classes).
            labels: Indices of the true classes (n,).
        """
        log_probs, labels = log_probs.double().cpu(), labels.cpu()
        probabilities = log_probs.exp()
        confidence, predicted = probabilities.max(-1)
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        self._count.index_add_(0, bins, torch.ones_like(confidence))
        self._correct.index_add_(0, bins, (predicted == labels).double())
        self._confidence.index_add_(0, bins, confidence)
        # sum_k (p_k - y_k)^2 = sum_k p_k^2 - 2 p_y + 1
        of_label = probabilities.gather(-1, labels[:, None])[:, 0]
        self._brier += float((probabilities.square().sum(-1) - 2 * of_label + 1).sum())

    def figures(self) -> dict[str, Any]:
        """Return `ece`, `brier`, the number of `predictions`, and `bins` with share, accuracy and confidence."""
        total = float(self._count.sum())
        filled = self._count > 0
        count = self._count[filled]
        accuracy, confidence = self._correct[filled] / count, self._confidence[filled] / count
        bins = torch.stack([count / total, accuracy, confidence], 1).tolist()
        return {
            "ece": float((count / total * (accuracy - confidence).abs()).sum()),
            "brier": self._brier / total,
            "predictions": int(total),
            "bins": [dict(zip(("share", "accuracy", "confidence"), one, strict=True)) for one in bins],
        }


def class_calibration(log_probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the figures of a classifier from the classes' log-probabilities (rows, classes) and the labels (rows,)."""
    calibration = Calibration()
    calibration.add(log_probs, labels)
    return calibration.figures()


@torch.no_grad()
def token_calibration(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int) -> dict[str, Any]:
    """Return the figures of a language model's next tokens at all supervised positions of prepared chats.

    Args:
        model: A causal language model.
        rows: Prepared chats.
        pad: Token id of padding.
        batch_size: Rows per forward pass.
    """
    calibration = Calibration()
    collate, device = RightPaddingCollator(pad), next(model.parameters()).device
    for batch in by_length([len(row["input_ids"]) for row in rows], batch_size, device):
        inputs = collate([rows[index] for index in batch])
        labels = inputs.pop("labels")[:, 1:]
        inputs.pop("weight", None)
        logits = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits[:, :-1]
        for of_row, labels_of_row in zip(logits, labels, strict=True):  # a batch of log-probabilities may not fit
            mask = labels_of_row != -100
            calibration.add(of_row[mask.to(device)].float().log_softmax(-1), labels_of_row[mask])
    return calibration.figures()
