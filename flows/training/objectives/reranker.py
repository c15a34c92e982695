"""reranker: softmax or binary cross entropy of a row's passages, `peftcore.train.reranking`."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from flows.base.folder import load_tokenizer
from flows.data.rows import Row
from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from flows.training.reranking_pairs import with_pairs
from peftcore import TaskType
from peftcore.train import PAIRS_COLUMN, TYPES_COLUMN, RerankingCollator, RerankingTrainer, RightPaddingCollator

TEXTS = ("query", "positive", "negatives")


class Reranker(Objective):
    """Objective of queries with passages, whose model scores a pair."""

    rows = Rows("retrieval", TEXTS, (PAIRS_COLUMN,), TaskType.SEQ_CLS)
    outputs = ("relevance",)

    def complete_rows(self, params: Params, base: Path, rows: list[Row]) -> list[Row]:
        """Return the rows with the token ids of their pairs."""
        return with_pairs(rows, load_tokenizer(base), params.train.reranker.negatives, params.project.seed)

    def longest(self, rows: Dataset) -> int:
        """Return the tokens of the longest pair."""
        return max(len(ids) for pairs in rows[PAIRS_COLUMN] for ids in pairs)

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the padding collator of these rows."""
        return RerankingCollator(pad)

    def start_batch(self, rows: list[Row], pad: int) -> dict[str, Any]:
        """Return the forward's arguments for a data-driven initialisation: the pairs of the right passages."""
        firsts = [{name: row[name][:1] for name in (PAIRS_COLUMN, TYPES_COLUMN) if row.get(name)} for row in rows]
        batch = RerankingCollator(pad)(firsts)
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: batch[name][:, 0] for name in names if name in batch}

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return f"{params.train.reranker.loss} cross entropy of passages"

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        return RerankingTrainer, {"ranking_loss": params.train.reranker.loss}
