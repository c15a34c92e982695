"""embedding: contrastive loss of queries and passages, `peftcore.train.embedding`."""

from typing import Any

from datasets import Dataset

from flows.data.rows import Row
from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import RETRIEVAL_COLUMNS, Contrastive, EmbeddingCollator, EmbeddingTrainer, RightPaddingCollator


class Embedding(Objective):
    """Objective of queries with passages, whose model has no head."""

    rows = Rows("retrieval", RETRIEVAL_COLUMNS, ("query_input_ids", "positive_input_ids"), TaskType.FEATURE_EXTRACTION)
    outputs = ()

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the padding collator of these rows."""
        return EmbeddingCollator(pad)

    def start_batch(self, rows: list[Row], pad: int) -> dict[str, Any]:
        """Return the forward's arguments for a data-driven initialisation: the texts of queries and positives."""
        texts = [{"input_ids": row[name], "labels": []} for name in self.rows.token_ids for row in rows]
        batch = RightPaddingCollator(pad)(texts)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return repr(contrastive_loss(params))

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        options = params.train.embedding
        return EmbeddingTrainer, {
            "contrastive": contrastive_loss(params),
            "pooling": options.pooling,
            "normalize": options.normalize,
            "rows_at_once": options.rows_at_once,
        }


def contrastive_loss(params: Params) -> Contrastive:
    """Return the contrastive loss of the parameters."""
    options = params.train.embedding
    return Contrastive(options.scale, options.symmetric, options.mask_false_negatives)
