"""Fidelity of one model's predictions to another's, at the supervised positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from flows.data.rows import Row
from flows.data.tokens import IGNORED
from flows.evaluation.common_prefix import share_prefix
from flows.evaluation.scoring import (
    by_length,
    class_log_probs,
    padding_multiple,
    pairs_rewards,
    tag_log_probs,
    target_batches_logits,
)
from peftcore.train import RightPaddingCollator, supervised_logits, supervised_positions

MAX_KEPT = 512 * 2**20
"""Memory for predictions of a reference that are kept (bytes)."""


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


class Reference:
    """The model that candidates are compared with, and its predictions for some rows.

    Predictions are computed for the first candidate and kept for the next ones, as far as `MAX_KEPT` allows.

    Args:
        model: The reference.
        rows: The rows to predict, with the columns of the model's task.
        pad: Token id of padding.
        batch_size: Rows per forward pass.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int):
        self.model, self.rows, self.pad, self.batch_size = model, rows, pad, batch_size
        self._kept: dict[int, Tensor] = {}
        self._room = MAX_KEPT

    @cached_property
    def after_prefix(self) -> tuple[nn.Module, Sequence[Row]]:
        """`share_prefix` of model and rows."""
        return share_prefix(self.model, self.rows)

    def predictions(self, key: int, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return the reference's predictions of batch `key`, from the cache or as `compute(model)`."""
        if key in self._kept:
            return self._kept[key]
        predicted = compute(self.model)
        if (size := predicted.numel() * predicted.element_size()) <= self._room:
            self._kept[key] = predicted
            self._room -= size
        return predicted


@torch.no_grad()
def fidelity(reference: Reference, candidate: nn.Module, bar: Any = None) -> Fidelity:
    """Compare two models with the same vocabulary at the supervised positions of the reference's rows.

    Args:
        reference: The reference model and its rows.
        candidate: The model to compare.
        bar: Progress bar that counts rows.
    """
    rows, device = reference.rows, next(candidate.parameters()).device
    collate = RightPaddingCollator(reference.pad, padding_multiple(device))
    after = {reference.model: reference.after_prefix, candidate: share_prefix(candidate, rows)}
    divergence, agreed, tokens = 0.0, 0, 0
    losses = [0.0, 0.0]
    rests = reference.after_prefix[1]
    batches = by_length([len(row["input_ids"]) for row in rests], reference.batch_size, device)
    for number, batch in enumerate(batches):

        def predict(model: nn.Module, batch: list[int] = batch) -> Tensor:
            reader, rests = after[model]
            inputs: dict[str, Any] = {name: t.to(device) for name, t in collate([rests[i] for i in batch]).items()}
            mask = supervised_positions(inputs.pop("labels"))
            inputs.pop("weight", None)
            return supervised_logits(reader, inputs | {"use_cache": False}, mask)

        labels = [label for i in batch for label in rows[i]["labels"][1:] if label != IGNORED]
        answers = torch.tensor(labels, device=device)[:, None]
        logits = (reference.predictions(number, predict), predict(candidate))
        p, q = (each.float().log_softmax(-1) for each in logits)
        divergence += (p.exp() * (p - q)).sum(-1).double().sum().item()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        for k, predicted in enumerate((p, q)):
            losses[k] -= predicted.gather(1, answers).double().sum().item()
        tokens += len(p)
        if bar is not None:
            bar.update(len(batch))
    reference_loss, loss = (total / tokens for total in losses)
    return Fidelity(divergence / tokens, agreed / tokens, loss, reference_loss, tokens)


def class_fidelity(reference: Reference, candidate: nn.Module, bar: Any = None) -> Fidelity:
    """Compare two classifiers of the same classes on the reference's rows. Each text counts as one token.

    Args:
        reference: The reference model and its rows.
        candidate: The model to compare.
        bar: Progress bar that counts rows.
    """
    rows = reference.rows
    predict = partial(class_log_probs, rows=rows, pad=reference.pad, batch_size=reference.batch_size)
    p, q = reference.predictions(0, predict), predict(candidate, bar=bar)
    return _of_classes(p, q, torch.tensor([row["label"] for row in rows]))


def tag_fidelity(reference: Reference, candidate: nn.Module, bar: Any = None) -> Fidelity:
    """Compare two token classifiers of the same tags on the reference's rows. Each word counts as one token.

    Args:
        reference: The reference model and its rows.
        candidate: The model to compare.
        bar: Progress bar that counts rows.
    """
    rows = reference.rows
    score = partial(tag_log_probs, rows=rows, pad=reference.pad, batch_size=reference.batch_size)
    p = reference.predictions(0, lambda model: torch.cat([log_probs for log_probs, _ in score(model)]))
    q, labels = (torch.cat(part) for part in zip(*score(candidate, bar=bar), strict=True))
    return _of_classes(p, q, labels)


def _of_classes(p: Tensor, q: Tensor, labels: Tensor) -> Fidelity:
    """Compare log-probabilities (n, classes) of reference p and candidate q at the labels (n,)."""
    reference_loss, loss = (-log_probs.gather(1, labels[:, None]).mean().item() for log_probs in (p, q))
    divergence = (p.exp() * (p - q)).sum(1).mean().item()
    agreement = (p.argmax(1) == q.argmax(1)).double().mean().item()
    return Fidelity(divergence, agreement, loss, reference_loss, len(labels))


def target_fidelity(reference: Reference, candidate: nn.Module, bar: Any = None) -> Fidelity:
    """Compare two encoder-decoders with the same vocabulary at the targets' tokens of the reference's rows.

    Args:
        reference: The reference model and its rows.
        candidate: The model to compare.
        bar: Progress bar that counts rows.
    """
    divergence, agreed, tokens = 0.0, 0, 0
    losses = [0.0, 0.0]
    batches = [
        target_batches_logits(model, reference.rows, reference.pad, reference.batch_size, of)
        for model, of in ((reference.model, None), (candidate, bar))
    ]
    for (expected, labels), (logits, _) in zip(*batches, strict=True):
        p, q = (each.float().log_softmax(-1) for each in (expected, logits))
        divergence += (p.exp() * (p - q)).sum(-1).double().sum().item()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        losses = [
            total - predicted.gather(1, labels[:, None]).double().sum().item()
            for total, predicted in zip(losses, (p, q), strict=True)
        ]
        tokens += len(labels)
    reference_loss, loss = (total / tokens for total in losses)
    return Fidelity(divergence / tokens, agreed / tokens, loss, reference_loss, tokens)


def reward_fidelity(reference: Reference, candidate: nn.Module, bar: Any = None) -> Fidelity:
    """Compare two reward models on the reference's pairs. Each pair counts as one token.

    A model's prediction is the probability that the chosen answer wins, the sigmoid of its margin.

    Args:
        reference: The reference model and its rows.
        candidate: The model to compare.
        bar: Progress bar that counts rows.
    """
    predict = partial(pairs_rewards, rows=reference.rows, pad=reference.pad, batch_size=reference.batch_size)
    rewards = reference.predictions(0, predict), predict(candidate, bar=bar)
    p, q = (chosen - rejected for chosen, rejected in rewards)
    # the log-probabilities of both outcomes: the chosen answer wins, or the rejected one
    divergence = sum(
        (F.logsigmoid(sign * p).exp() * (F.logsigmoid(sign * p) - F.logsigmoid(sign * q))).mean().item()
        for sign in (1, -1)
    )
    reference_loss, loss = (-F.logsigmoid(margins).mean().item() for margins in (p, q))
    agreement = ((p > 0) == (q > 0)).double().mean().item()
    return Fidelity(divergence, agreement, loss, reference_loss, len(reference.rows))


def same_function(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Return True if two models have the same class, configuration and tensors, so that they predict the same."""
    if type(first) is not type(second) or _settings(first) != _settings(second):
        return False
    tensors, others = first.state_dict(), second.state_dict()
    return tensors.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    origin = ("_name_or_path", "transformers_version", "architectures")  # never change a prediction
    return {name: value for name, value in model.config.to_dict().items() if name not in origin}
