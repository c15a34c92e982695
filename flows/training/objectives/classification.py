"""classification: cross entropy of the classes of labelled texts."""

from typing import Any

from datasets import Dataset

from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import (
    ClassificationCollator,
    ClassificationTrainer,
    RightPaddingCollator,
    balanced_class_weights,
)


class Classification(Objective):
    """Objective of labelled texts."""

    rows = Rows("classification", ("input_ids", "label"), ("input_ids",), TaskType.SEQ_CLS)
    has_classes = True

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the padding collator of these rows."""
        return ClassificationCollator(pad)

    def _start_collator(self, pad: int) -> RightPaddingCollator:
        return ClassificationCollator(pad)

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return "cross entropy of classes"

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        if labels is None:
            raise ValueError("classification: the names of the classes are needed, got None")
        balanced = params.train.classification.class_weights == "balanced"
        weights = balanced_class_weights(rows["label"], len(labels)) if balanced else None
        return ClassificationTrainer, {"class_weights": weights}
