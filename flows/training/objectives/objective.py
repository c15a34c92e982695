"""Interface of a training objective: its rows, collator, loss and trainer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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


class Objective(ABC):
    """One value of `train.objective`. The defaults fit rows {"input_ids", "labels"} of a causal language model."""

    rows: Rows
    packed = False
    """True if rows may be concatenated."""
    has_classes = False
    """True if the model has a classification head, whose names the prepare stage writes."""
    optional_columns: tuple[str, ...] = ()
    """Columns that training reads if the prepared rows have them."""
    outputs: tuple[str, ...] | None = None
    """Names of a head's outputs that do not depend on the data; () for a model without a head."""

    def complete_rows(self, params: Params, base: Path, rows: list[Row]) -> list[Row]:
        """Return prepared rows with what the model reads. base: folder of the base, for its tokenizer."""
        return rows

    def longest(self, rows: Dataset) -> int:
        """Return the tokens of the longest row."""
        return max(len(ids) for name in self.rows.token_ids for ids in rows[name])

    def columns(self, present: Sequence[str]) -> list[str]:
        """Return the columns that training reads, of those in the file of a split."""
        return [*self.rows.columns, *(name for name in self.optional_columns if name in present)]

    def training_rows(self, rows: list[Row]) -> list[Row]:
        """Return the rows as the trainer takes them."""
        return rows

    def new_tokens(self, params: Params) -> int:
        """Return the maximum tokens that training generates behind a row."""
        return 0

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

    @abstractmethod
    def loss_function(self, params: Params) -> str:
        """Return a description of the test loss; losses of two runs are comparable if descriptions and rows agree."""

    @abstractmethod
    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer of training rows; labels are the names of classes, teacher a model to distil from."""
