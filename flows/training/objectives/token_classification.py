"""token_classification: cross entropy of the tags of words, `peftcore.train.token_classification`."""

from typing import Any

from datasets import Dataset

from flows.data.rows import Row
from flows.data.tokens import IGNORED
from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import (
    RightPaddingCollator,
    TokenClassificationCollator,
    TokenClassificationTrainer,
    balanced_class_weights,
)


class TokenClassification(Objective):
    """Objective of tagged words."""

    rows = Rows("token_classification", ("input_ids", "labels", "tags"), ("input_ids",), TaskType.TOKEN_CLS)
    has_classes = True

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the padding collator of these rows."""
        return TokenClassificationCollator(pad)

    def model_row(self, row: Row) -> Row:
        """Return the row without the names of its tags."""
        return {"input_ids": row["input_ids"], "labels": row["labels"]}

    def _start_collator(self, pad: int) -> RightPaddingCollator:
        return TokenClassificationCollator(pad)

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return "cross entropy of tags"

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        if labels is None:
            raise ValueError("token_classification: the names of the tags are needed, got None")
        weights = None
        if params.train.token_classification.class_weights == "balanced":
            numbers = [label for row in rows["labels"] for label in row if label != IGNORED]
            weights = balanced_class_weights(numbers, len(labels))
        return TokenClassificationTrainer, {
            "class_weights": weights,
            "tags": labels,
            "scheme": params.data.tag_scheme,
        }
