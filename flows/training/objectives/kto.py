"""kto: loss of single answers that are marked as desirable or undesirable, `peftcore.train.kto`."""

import logging
from typing import Any

from datasets import Dataset

from flows.data.rows import Row
from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import (
    UNPAIRED_COLUMNS,
    Kto,
    KtoTrainer,
    RightPaddingCollator,
    UnpairedPreferenceCollator,
    kto_weight_range,
)

log = logging.getLogger(__name__)


class UnpairedPreference(Objective):
    """Objective of answers with a label."""

    rows = Rows("unpaired_preference", UNPAIRED_COLUMNS, ("input_ids",), TaskType.CAUSAL_LM)

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the padding collator of these rows."""
        return UnpairedPreferenceCollator(pad, max_length=longest_row)

    def model_row(self, row: Row) -> Row:
        """Return the answer without its label."""
        return {"input_ids": row["input_ids"], "labels": row["labels"]}

    def start_rows(self, rows: Dataset) -> Dataset:
        """Return the desirable answers."""
        return rows.select([number for number, desirable in enumerate(rows["desirable"]) if desirable])

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return repr(kto_objective(params))

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        kto, desirable = kto_objective(params), sum(rows["desirable"])
        _warn_of_imbalance(kto, desirable, len(rows) - desirable)
        return KtoTrainer, {"objective": kto, "reference": "base"}


def kto_objective(params: Params) -> Kto:
    """Return the KTO loss of the parameters."""
    options = params.train.kto
    return Kto(options.beta, options.loss, options.desirable_weight, options.undesirable_weight)


def _warn_of_imbalance(kto: Kto, desirable: int, undesirable: int) -> None:
    """Log a warning if the weights do not balance the two kinds of answers as the KTO paper recommends."""
    if not (desirable and undesirable and kto.desirable_weight and kto.undesirable_weight):
        return
    low, high = kto_weight_range(desirable, undesirable)
    ratio = kto.desirable_weight / kto.undesirable_weight
    if desirable != undesirable and not round(low, 2) <= round(ratio, 2) <= round(high, 2):
        log.warning(
            "%d training answers are desirable and %d are not: train.kto.desirable_weight should be %.2f to %.2f times "
            "undesirable_weight (arXiv:2402.01306, eq. 8), and it is %.2f times",
            *(desirable, undesirable, low, high, ratio),
        )
