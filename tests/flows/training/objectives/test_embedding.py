"""The objective embedding: rows that it accepts, its trainer's options, and a data-driven start."""

from typing import Any

from flows.params import Params
from flows.training.objectives import objective_of, padded_collator, start_batch
from peftcore.train import Contrastive, EmbeddingCollator, EmbeddingTrainer

ROW = {"query_input_ids": [1, 2], "positive_input_ids": [3, 4, 5], "negatives_input_ids": [[6]]}


def params(**options: Any) -> Params:
    return Params.model_validate(
        {
            "data": {"source": "a.jsonl", "kind": "retrieval"},
            "train": {"objective": "embedding", "embedding": options},
        }
    )


def test_every_option_of_the_parameters_reaches_the_trainer() -> None:
    given = params(
        pooling="cls", normalize=False, scale=5.0, symmetric=True, mask_false_negatives=False, rows_at_once=2
    )
    trainer, options = objective_of(given).trainer(given, None, None, None)  # type: ignore[arg-type]
    assert trainer is EmbeddingTrainer
    loss = Contrastive(5.0, True, False)
    assert options == {"contrastive": loss, "pooling": "cls", "normalize": False, "rows_at_once": 2}
    assert objective_of(given).loss_function(given) == repr(loss)
    assert isinstance(padded_collator(given, 0, 8), EmbeddingCollator) and objective_of(given).outputs == ()


def test_a_start_from_data_sees_queries_and_passages() -> None:
    batch = start_batch(params(), [ROW], 0)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert [ids[: int(n)].tolist() for ids, n in zip(*batch.values(), strict=False) for n in [len(ids.nonzero())]] == [
        [1, 2],
        [3, 4, 5],
    ]
