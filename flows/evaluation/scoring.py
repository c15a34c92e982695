"""Losses and log-probabilities of held-out rows, and ROUGE-L of generated answers."""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import regex
import torch
from torch import Tensor, nn

from flows.data.rows import Row
from flows.evaluation.common_prefix import share_prefix
from flows.evaluation.prompt_states import PromptStates
from peftcore.train import (
    ClassificationCollator,
    PairLogProbs,
    PreferenceCollator,
    RewardCollator,
    RightPaddingCollator,
    SequenceToSequenceCollator,
    TokenClassificationCollator,
    labelled_logits,
    mismatched_answers,
    pair_log_probs,
    pair_rewards,
    row_log_probs,
    row_sums,
    target_logits,
    target_losses,
    token_losses,
)


@dataclass(frozen=True)
class RowLosses:
    """Mean loss (nats), number of tokens and weight of each row. Without `weighed`, a row's weight is its tokens."""

    means: list[float]
    tokens: list[int]
    weighed: list[float] | None = None

    @property
    def weights(self) -> list[float]:
        """Weight of each row."""
        return [float(n) for n in self.tokens] if self.weighed is None else self.weighed

    @property
    def loss(self) -> float:
        """Weighted mean over the rows (nats per token); NaN if the weights sum to 0."""
        weight = sum(self.weights)
        return sum(m * w for m, w in zip(self.means, self.weights, strict=True)) / weight if weight else math.nan

    def of(self, indices: Sequence[int]) -> "RowLosses":
        """Return the losses of the rows at `indices`, in that order."""
        means, weights = ([column[i] for i in indices] for column in (self.means, self.weights))
        return RowLosses(means, [self.tokens[i] for i in indices], weights)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


CPU_TOKENS = 768
"""Most tokens of a forward pass without generation on a CPU: the activations of more tokens do not stay in its caches.

256 rows of SmolLM2-135M take 20.7 s with 768 tokens and 21.4 s with 512 (2 cores of an AMD EPYC with AVX-512); when
PyTorch computed attention, batches of 32 rows took a quarter longer than those of 512 tokens.
"""


def by_length(lengths: Sequence[int], batch_size: int, device: torch.device | None = None) -> list[list[int]]:
    """Return batches of row indices with similar lengths, longest first, so that out-of-memory errors come early.

    Args:
        lengths: Tokens of each row.
        batch_size: Maximum rows of a batch.
        device: Where the batches are computed; on a CPU, a batch has one row or at most `CPU_TOKENS` tokens, padding
            included. None: no such limit.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, start = [], 0
    while start < len(order):
        rows = batch_size
        if device is not None and device.type == "cpu":
            rows = max(1, min(rows, CPU_TOKENS // max(1, lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def padding_multiple(device: torch.device) -> int:
    """Return the number of which a batch's length has to be a multiple: 8 for matrix kernels of GPUs, 1 on a CPU."""
    return 1 if device.type == "cpu" else 8


@torch.no_grad()
def row_losses(
    model: nn.Module,
    rows: Sequence[Row],
    pad: int,
    batch_size: int,
    bar: Any = None,
    prompts: PromptStates | None = None,
) -> RowLosses:
    """Return the loss of each row.

    A row's weight in the total loss is its number of supervised tokens, times the row's `weight` if there is one. The
    output head runs at supervised positions only. The tokens with which all rows begin are computed once.

    Args:
        model: A causal language model.
        rows: Prepared chats.
        pad: Token id of padding.
        batch_size: Rows per forward pass.
        bar: Progress bar that counts rows.
        prompts: Store of the prompts' keys and values, from which answers are generated later; None: nothing is kept.
    """
    means, tokens = [0.0] * len(rows), [0] * len(rows)
    device = next(model.parameters()).device
    collate = RightPaddingCollator(pad, padding_multiple(device))
    model, rests = share_prefix(model, rows)
    for batch in by_length([len(row["input_ids"]) for row in rests], batch_size, device):
        inputs = {name: tensor.to(device) for name, tensor in collate([rests[i] for i in batch]).items()}
        labels, _ = inputs.pop("labels"), inputs.pop("weight", None)
        cache = None if prompts is None else prompts.cache_for(model, batch)
        options: dict[str, Any] = {"use_cache": False} if cache is None else {"cache": cache}
        sums, counts = row_sums(*token_losses(model, inputs | options, labels))
        if prompts is not None and cache is not None:
            prompts.keep(batch, cache)
        for i, total, count in zip(batch, sums.tolist(), counts.tolist(), strict=True):
            means[i], tokens[i] = total / count, count
        if bar is not None:
            bar.update(len(batch))
    return RowLosses(means, tokens, [n * row.get("weight", 1.0) for n, row in zip(tokens, rows, strict=True)])


@torch.no_grad()
def pairs_log_probs(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None) -> PairLogProbs:
    """Return the log-probabilities of all preference pairs in float64.

    Args:
        model: A causal language model.
        rows: Prepared preference pairs.
        pad: Token id of padding.
        batch_size: Answers per forward pass; a pair has two.
        bar: Progress bar that counts rows.
    """
    collate, device = PreferenceCollator(pad), next(model.parameters()).device
    columns = torch.zeros(4, len(rows), dtype=torch.float64)
    lengths = [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows]
    for batch in by_length(lengths, max(1, batch_size // 2), device):
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in batch]).items()}
        pairs = pair_log_probs(model, inputs)
        parts = (pairs.chosen, pairs.rejected, pairs.chosen_tokens, pairs.rejected_tokens)
        columns[:, batch] = torch.stack([part.double().cpu() for part in parts])
        if bar is not None:
            bar.update(len(batch))
    return PairLogProbs(*columns)


@dataclass(frozen=True)
class AnswerLogProbs:
    """Log-probabilities of answers in nats, (rows,) in float64: of each row's own, and of the row before it in the set.

    tokens: supervised tokens of each row's own answer.
    """

    own: Tensor
    mismatched: Tensor
    tokens: list[int]


@torch.no_grad()
def answers_log_probs(
    model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None
) -> AnswerLogProbs:
    """Return the log-probabilities of all rows' answers, and of mismatched ones for KTO's reference point.

    A prompt with a mismatched answer is cut off at the length of the longest row.

    Args:
        model: A causal language model.
        rows: Prepared unpaired preferences.
        pad: Token id of padding.
        batch_size: Answers per forward pass.
        bar: Progress bar that counts rows.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    sequences: list[Row] = [*rows, *mismatched_answers(rows, longest)]
    collate, device = RightPaddingCollator(pad), next(model.parameters()).device
    values, tokens = torch.zeros(len(sequences), dtype=torch.float64), [0] * len(sequences)
    for batch in by_length([len(row["input_ids"]) for row in sequences], batch_size, device):
        columns = collate([{name: sequences[i][name] for name in ("input_ids", "labels")} for i in batch])
        sums, counts = row_log_probs(model, **{name: tensor.to(device) for name, tensor in columns.items()})
        values[batch] = sums.double().cpu()
        for i, count in zip(batch, counts.tolist(), strict=True):
            tokens[i] = count
        if bar is not None:
            bar.update(sum(i < len(rows) for i in batch))
    return AnswerLogProbs(values[: len(rows)], values[len(rows) :], tokens[: len(rows)])


@torch.no_grad()
def class_log_probs(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None) -> Tensor:
    """Return the classes' log-probabilities (rows, classes) in float64 on the CPU.

    Args:
        model: A sequence classifier.
        rows: Prepared labelled texts.
        pad: Token id of padding.
        batch_size: Rows per forward pass.
        bar: Progress bar that counts rows.
    """
    collate, device = ClassificationCollator(pad), next(model.parameters()).device
    results: list[Tensor | None] = [None] * len(rows)
    for batch in by_length([len(row["input_ids"]) for row in rows], batch_size, device):
        columns = collate([rows[i] for i in batch])
        inputs = {name: columns[name].to(device) for name in ("input_ids", "attention_mask")}
        for i, log_probs in zip(batch, model(**inputs).logits.double().log_softmax(-1).cpu(), strict=True):
            results[i] = log_probs
        if bar is not None:
            bar.update(len(batch))
    return torch.stack([one for one in results if one is not None])


@torch.no_grad()
def tag_log_probs(
    model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None
) -> list[tuple[Tensor, Tensor]]:
    """Return the tags' log-probabilities (words, tags) in float64 on the CPU and the labels (words,) of each row.

    Args:
        model: A token classifier.
        rows: Prepared rows of tagged words.
        pad: Token id of padding.
        batch_size: Rows per forward pass.
        bar: Progress bar that counts rows.
    """
    collate, device = TokenClassificationCollator(pad), next(model.parameters()).device
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in by_length([len(row["input_ids"]) for row in rows], batch_size, device):
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in batch]).items()}
        logits, mask = labelled_logits(model, inputs)
        log_probs, labels = logits.double().log_softmax(-1).cpu(), inputs["labels"][mask].cpu()
        words = mask.sum(1).tolist()
        for i, *pair in zip(batch, log_probs.split(words), labels.split(words), strict=True):
            results[i] = (pair[0], pair[1])
        if bar is not None:
            bar.update(len(batch))
    return [results[i] for i in range(len(rows))]


@torch.no_grad()
def sequence_losses(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None) -> RowLosses:
    """Return the loss of each row's target. The weight of a row is its number of target tokens times its `weight`.

    Args:
        model: An encoder-decoder.
        rows: Prepared sources with targets.
        pad: Token id of padding.
        batch_size: Rows per forward pass.
        bar: Progress bar that counts rows.
    """
    means = [0.0] * len(rows)
    for batch, inputs in _target_batches(model, rows, pad, batch_size, bar):
        for i, loss in zip(batch, target_losses(model, inputs).tolist(), strict=True):
            means[i] = loss
    tokens = [len(row["labels"]) for row in rows]
    return RowLosses(means, tokens, [n * row.get("weight", 1.0) for n, row in zip(tokens, rows, strict=True)])


@torch.no_grad()
def target_batches_logits(
    model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits (n, vocabulary) and the labels (n,) of the target tokens of each batch, always in one order.

    The arguments are those of `sequence_losses`.
    """
    for _, inputs in _target_batches(model, rows, pad, batch_size, bar):
        logits, mask = target_logits(model, inputs)
        yield logits, inputs["labels"][mask]


def _target_batches(
    model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield the indices of the rows of each batch, and the batch on the model's device."""
    collate, device = SequenceToSequenceCollator(pad), next(model.parameters()).device
    for batch in by_length([len(row["input_ids"]) + len(row["labels"]) for row in rows], batch_size, device):
        yield batch, {name: tensor.to(device) for name, tensor in collate([rows[i] for i in batch]).items()}
        if bar is not None:
            bar.update(len(batch))


@torch.no_grad()
def pairs_rewards(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None) -> Tensor:
    """Return the rewards of chosen and rejected answers, (2, rows) in float64 on the CPU.

    Args:
        model: A sequence classifier with one output.
        rows: Prepared preference pairs.
        pad: Token id of padding.
        batch_size: Answers per forward pass; a pair has two.
        bar: Progress bar that counts rows.
    """
    collate, device = RewardCollator(pad), next(model.parameters()).device
    rewards = torch.zeros(2, len(rows), dtype=torch.float64)
    lengths = [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows]
    for batch in by_length(lengths, max(1, batch_size // 2), device):
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in batch]).items()}
        rewards[:, batch] = torch.stack(pair_rewards(model, inputs)).double().cpu()
        if bar is not None:
            bar.update(len(batch))
    return rewards


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the ROUGE-L F-measure (0 to 1) of each answer: longest common subsequence of `words_of` both texts."""
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes over a second

    # rouge_score's own tokenizer knows the letters a to z only; on ASCII texts both give the same
    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words_of))
    return [float(scorer.score(r, a)["rougeL"].fmeasure) for r, a in zip(references, answers, strict=True)]


_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\W_{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Return the lower-cased words of a text, without punctuation.

    In scripts without spaces between words, such as Chinese, each character is a word.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())
