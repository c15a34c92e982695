"""Batches of rows of similar length, padded on the right: texts, preference pairs, marked answers, labelled texts.

The rows of a batch are neighbours in a length-sorted pool, so there is little padding. The batches come in random
order, so training does not go from short to long rows. The order depends only on (seed, epoch): a resumed run sees the
same batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from peftcore.train.losses import IGNORED

POOL = 16
"""Batches (count) in a pool; a larger pool needs less padding and shuffles less."""
WEIGHT = "weight"
"""Column of a dataset and key of a batch: weights of rows, or of the tokens of a packed row."""
REFERENCE_COLUMNS = ("reference_chosen", "reference_rejected")
"""Columns of pairs: the reference model's log-probabilities (nats) of the chosen and the rejected answer."""

MISMATCHED = "mismatched_"
"""Prefix of columns and of keys of a batch: a row's prompt with the answer of another row."""


class LengthGroupedSampler(Sampler[int]):
    """Row indices of which each `batch_size` successive ones are rows of similar length.

    Args:
        lengths: Tokens in each row.
        batch_size: Rows per forward pass.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order is drawn next; the trainer calls this method."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[Tensor] = []
        for pool in order.split(self.batch_size * POOL):
            by_length = pool[self.lengths[pool].argsort(stable=True)]
            batches.extend(by_length.split(self.batch_size))
        # The loader cuts the indices by count, so a short batch before the end would shift all batches after it.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        short = [batch for batch in batches if len(batch) != self.batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return iter(torch.cat(shuffled + short).tolist()) if batches else iter(())


@dataclass
class RightPaddingCollator:
    """Collator of rows {"input_ids", "labels"} into tensors (B, T), T the longest row's length.

    If a row has a "weight", the batch has `weight` (B, 1), 1 for rows without one.

    Args:
        pad_token_id: Any valid token id; padding is masked by attention_mask and labelled -100.
        multiple: T is rounded up to a multiple of this number; 8 keeps matrix kernels on their fast path.
    """

    pad_token_id: int
    multiple: int = 8

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels`, `attention_mask` (B, T) and, if a row has one, `weight` (B, 1)."""
        batch = self._padded(rows)
        if any(WEIGHT in row for row in rows):
            batch[WEIGHT] = row_weights(rows)[:, None]
        return batch

    def _padded(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = torch.as_tensor(row["input_ids"])
            labels[i, : len(row["labels"])] = torch.as_tensor(row["labels"])
            attention_mask[i, :length] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def with_model_padding(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose padding is the model's own padding token, whatever token the collator has padded with.

    A sequence classifier over a decoder reads the last token that is not its padding token.

    Args:
        model: The model as Trainer wraps it.
        inputs: `input_ids` and `attention_mask` (B, T), and further arguments of the forward.
    """
    config = getattr(model, "config", None) or getattr(getattr(model, "module", None), "config", None)
    pad = getattr(config, "pad_token_id", None)
    if pad is None or pad < 0 or "input_ids" not in inputs or "attention_mask" not in inputs:
        return dict(inputs)
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)}


@dataclass
class PreferenceCollator(RightPaddingCollator):
    """Collator of P pairs into tensors (P, 2, T), the chosen answer before the rejected one.

    Rows: {"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}, labels -100 on the prompt.
    T: length of the longest answer with its prompt. The arguments are those of `RightPaddingCollator`.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the padded pairs, `weight` (P,), 1 by default, and the reference columns if rows have them."""
        sides = [
            {"input_ids": row[f"{side}_input_ids"], "labels": row[f"{side}_labels"]}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        batch = {name: tensor.unflatten(0, (len(rows), 2)) for name, tensor in self._padded(sides).items()}
        batch[WEIGHT] = row_weights(rows)
        for column in REFERENCE_COLUMNS:
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows])
        return batch


@dataclass
class UnpairedPreferenceCollator(RightPaddingCollator):
    """Collator of E rows {"input_ids", "labels", "desirable"} of single answers, labels -100 on the prompt.

    Each prompt is also joined with the answer of the row before it in the batch, for KTO's reference point, if there
    are several rows. Rows that already have `mismatched_input_ids` and `mismatched_labels` keep them.

    Args:
        max_length: Maximum tokens of a prompt joined with another row's answer; the rest is cut off. None: no limit.
        pad_token_id, multiple: See `RightPaddingCollator`.
    """

    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the padded rows, `desirable` and `weight` (E,), and the mismatched rows under MISMATCHED names."""
        batch = self._padded(rows)
        batch["desirable"] = torch.tensor([bool(row["desirable"]) for row in rows])
        batch[WEIGHT] = row_weights(rows)
        if f"{MISMATCHED}input_ids" in rows[0]:
            others = [{name: row[f"{MISMATCHED}{name}"] for name in ("input_ids", "labels")} for row in rows]
        else:
            others = mismatched_answers(rows, self.max_length) if len(rows) > 1 else []
        if others:
            batch |= {f"{MISMATCHED}{name}": tensor for name, tensor in self._padded(others).items()}
        return batch


def mismatched_answers(rows: Sequence[Mapping[str, Any]], max_length: int | None = None) -> list[dict[str, list[int]]]:
    """Return each row's prompt with the answer of the row before it, the first with the last, as TRL joins them.

    Args:
        rows: {"input_ids", "labels"}; a prompt ends before the first label that is not -100.
        max_length: Maximum tokens of a result; the rest is cut off. None: no limit.
    """
    starts = [
        next((i for i, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"])) for row in rows
    ]
    results = []
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        other, begin = rows[number - 1], starts[number - 1]
        ids = [*row["input_ids"][:start], *other["input_ids"][begin:]]
        labels = [*[IGNORED] * start, *other["labels"][begin:]]
        results.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return results


def with_mismatched_answers(rows: Any, max_length: int | None = None) -> Any:
    """Return rows with each prompt joined with the answer of the row before it in the set, as MISMATCHED columns.

    Args:
        rows: A datasets.Dataset, a sequence of mappings, a dictionary of these, or None.
        max_length: See `mismatched_answers`.
    """
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {name: with_mismatched_answers(each, max_length) for name, each in rows.items()}
    others = mismatched_answers(list(rows), max_length)
    if not hasattr(rows, "add_column"):
        return [
            {**row, **{f"{MISMATCHED}{name}": values for name, values in other.items()}}
            for row, other in zip(rows, others, strict=True)
        ]
    for name in ("input_ids", "labels"):
        rows = rows.add_column(f"{MISMATCHED}{name}", [other[name] for other in others])
    return rows


@dataclass
class ClassificationCollator(RightPaddingCollator):
    """Collator of rows {"input_ids", "label"} of labelled texts."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` (B, T), `labels` and `weight` (B,)."""
        batch = self._padded([{"input_ids": row["input_ids"], "labels": []} for row in rows])
        batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=torch.long)
        return batch | {WEIGHT: row_weights(rows)}


@dataclass
class SequenceToSequenceCollator(RightPaddingCollator):
    """Collator of rows {"input_ids", "labels"} of a source and a target, which differ in length."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` (B, S), `labels` (B, T) and `weight` (B,)."""
        batch = self._padded([{"input_ids": row["input_ids"], "labels": []} for row in rows])
        targets = self._padded([{"input_ids": row["labels"], "labels": row["labels"]} for row in rows])
        return batch | {"labels": targets["labels"], WEIGHT: row_weights(rows)}


@dataclass
class TokenClassificationCollator(RightPaddingCollator):
    """Collator of rows {"input_ids", "labels"} of tagged words: a class at each word's first token, -100 elsewhere."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `attention_mask` (B, T), and `weight` (B,)."""
        return self._padded(rows) | {WEIGHT: row_weights(rows)}


def row_weights(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the weights (B,) of rows, 1 for rows without one."""
    weights = [row.get(WEIGHT) for row in rows]
    return torch.tensor([1.0 if weight is None else weight for weight in weights], dtype=torch.float32)
