"""seq2seq: cross entropy of targets under an encoder-decoder, `peftcore.train.sequence_to_sequence`."""

from typing import Any

from datasets import Dataset

from flows.data.rows import Row
from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import RightPaddingCollator, SequenceToSequenceCollator, SequenceToSequenceTrainer


class SequenceToSequence(Objective):
    """Objective of sources with targets."""

    rows = Rows("seq2seq", ("input_ids", "labels", "target"), ("input_ids", "labels"), TaskType.SEQ_2_SEQ_LM)

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the padding collator of these rows."""
        return SequenceToSequenceCollator(pad)

    def model_row(self, row: Row) -> Row:
        """Return the row without the target's text."""
        return {"input_ids": row["input_ids"], "labels": row["labels"]}

    def _start_collator(self, pad: int) -> RightPaddingCollator:
        return SequenceToSequenceCollator(pad)

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return "cross entropy of target tokens"

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        return SequenceToSequenceTrainer, {}
