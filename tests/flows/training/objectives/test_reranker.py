"""The objective reranker: its trainer's options, the longest pair, and a data-driven start."""

from datasets import Dataset

from flows.params import Params
from flows.training.objectives import objective_of, start_batch
from peftcore.train import RerankingTrainer

ROW = {"pairs_input_ids": [[1, 2, 3], [1, 2, 4, 5]], "pairs_token_type_ids": [[0, 0, 1], [0, 0, 1, 1]]}
PARAMS = Params.model_validate(
    {
        "data": {"source": "a.jsonl", "kind": "retrieval"},
        "train": {"objective": "reranker", "reranker": {"loss": "binary"}},
    }
)


def test_the_loss_of_the_parameters_reaches_the_trainer() -> None:
    trainer, options = objective_of(PARAMS).trainer(PARAMS, None, None, None)  # type: ignore[arg-type]
    assert trainer is RerankingTrainer and options == {"ranking_loss": "binary"}
    assert objective_of(PARAMS).loss_function(PARAMS) == "binary cross entropy of passages"
    assert objective_of(PARAMS).outputs == ("relevance",)


def test_lengths_are_those_of_pairs() -> None:
    assert objective_of(PARAMS).longest(Dataset.from_list([ROW])) == 4


def test_a_start_from_data_sees_the_right_passages() -> None:
    batch = start_batch(PARAMS, [ROW], 0)
    assert batch["input_ids"][:, :3].tolist() == [[1, 2, 3]] and batch["token_type_ids"][:, :3].tolist() == [[0, 0, 1]]
    assert batch["attention_mask"].sum() == 3
