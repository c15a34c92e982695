"""Interface of a training objective: its rows, collator, loss and trainer."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from flows.data.rows import Row
from flows.params import Params
from peftcore import TaskType
from peftcore.train import WEIGHT, RightPaddingCollator

Trainer = tuple[type[Any], dict[str, Any]]
"""A trainer's class, an AdapterTrainer, and its arguments besides AdapterTrainer's."""


@dataclass(frozen=True)
class Rows:
    """Prepared rows of one kind: the columns that training reads, those with token ids, and the task."""

    kind: str
    columns: tuple[str, ...]
    token_ids: tuple[str, ...]
    task: TaskType


class Objective:
    """One value of `train.objective`. The defaults fit rows {"input_ids", "labels"} of a causal language model."""

    rows: Rows
    packed = False
    """True if rows may be concatenated."""
    has_classes = False
    """True if the model has a classification head, whose names the prepare stage writes."""

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the collator of padded batches. longest_row: length of the longest row in tokens."""
        return RightPaddingCollator(pad)

    def model_row(self, row: Row) -> Row:
        """Return the row as the bare model takes it, for comparing a merged model and for a data-driven start."""
        return row

    def start_rows(self, rows: Dataset) -> Dataset:
        """Return the rows that fit a data-driven initialisation."""
        return rows

    def start_batch(self, rows: list[Row], pad: int) -> dict[str, Any]:
        """Return the forward's arguments for a data-driven initialisation."""
        batch = self._start_collator(pad)([self.model_row(row) for row in rows])
        return {name: tensor for name, tensor in batch.items() if name != WEIGHT}

    def _start_collator(self, pad: int) -> RightPaddingCollator:
        return RightPaddingCollator(pad)

    def loss_function(self, params: Params) -> str:
        """Return a description of the test loss; losses of two runs are comparable if descriptions and rows agree."""
        raise NotImplementedError

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer of training rows; labels are the names of classes, teacher a model to distil from."""
        raise NotImplementedError
