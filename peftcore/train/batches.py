"""Batches of rows of like length, padded on the right: texts, pairs of answers, labelled texts.

Rows of one batch come from the same stretch of a length-sorted pool, so little is padded; the batches then come in
random order, so that length says nothing of when a row is seen. The order is a function of (seed, epoch) alone: a
resumed run sees the same batches, whatever has drawn random numbers in between.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from peftcore.train.losses import IGNORED

POOL = 16
"""Batches whose rows are sorted together; more pads less and mixes less."""
WEIGHT = "weight"
"""Column of a dataset and key of a batch: weights of rows, or of the tokens of a packed row."""
REFERENCE_COLUMNS = ("reference_chosen", "reference_rejected")
"""Columns of pairs: the reference's log-probabilities (nats) of the chosen and the rejected answer."""


class LengthGroupedSampler(Sampler[int]):
    """Row indices such that each run of `batch_size` of them holds rows of like length.

    lengths: tokens per row; batch_size: rows per forward pass; seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order is drawn next; the trainer calls it."""
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
        # A short batch is only right at the end: the loader cuts by count, and it would shift all after it.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        short = [batch for batch in batches if len(batch) != self.batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return iter(torch.cat(shuffled + short).tolist()) if batches else iter(())


@dataclass
class RightPaddingCollator:
    """Rows {"input_ids", "labels"} of token ids -> tensors (B, T), T the longest row's length.

    Where rows have a WEIGHT, the batch has it too, (B, 1).

    pad_token_id: any valid id, masked by attention_mask and labelled -100.
    multiple: T is rounded up to a multiple of it; 8 keeps matrix kernels on their fast path.
    """

    pad_token_id: int
    multiple: int = 8

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self._padded(rows)
        if WEIGHT in rows[0]:
            batch[WEIGHT] = torch.tensor([[row[WEIGHT]] for row in rows], dtype=torch.float32)
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


@dataclass
class PreferenceCollator(RightPaddingCollator):
    """P pairs -> tensors (P, 2, T), the chosen answer before the rejected one; T the longest answer's, with its prompt.

    Rows: {"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}, labels -100 on the prompt.
    The batch also has `weight` (P,), 1 where rows have none, and the reference's log-probabilities where they do.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sides = [
            {"input_ids": row[f"{side}_input_ids"], "labels": row[f"{side}_labels"]}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        batch = {name: tensor.unflatten(0, (len(rows), 2)) for name, tensor in self._padded(sides).items()}
        batch[WEIGHT] = _weights(rows)
        for column in REFERENCE_COLUMNS:
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows])
        return batch


@dataclass
class ClassificationCollator(RightPaddingCollator):
    """Rows {"input_ids", "label"} -> `input_ids` and `attention_mask` (B, T), `labels` and `weight` (B,)."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self._padded([{"input_ids": row["input_ids"], "labels": []} for row in rows])
        batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=torch.long)
        return batch | {WEIGHT: _weights(rows)}


def _weights(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([row.get(WEIGHT, 1.0) for row in rows], dtype=torch.float32)
