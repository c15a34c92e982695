"""Figures of rerankers from known scores, and of passages in random order."""

import math

import pytest
import torch

from flows.evaluation.rerankers import pair_tokens, random_order, ranking_values
from flows.params import Params

SCORES = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -torch.inf]], dtype=torch.float64)


def params(loss: str) -> Params:
    return Params.model_validate(
        {
            "data": {"source": "a.jsonl", "kind": "retrieval"},
            "train": {"objective": "reranker", "reranker": {"loss": loss}},
        }
    )


def test_values_of_known_scores() -> None:
    values = ranking_values(params("softmax"), SCORES)
    assert values["recall_at_1"].tolist() == [1, 0] and values["mrr_at_10"].tolist() == [1, 0.5]
    assert values["loss"].tolist() == pytest.approx(
        [math.log(1 + math.exp(-1) + math.exp(-2)), math.log(1 + math.exp(3))]
    )


@pytest.mark.parametrize(("loss", "expected"), [("softmax", math.log(4)), ("binary", math.log(2))])
def test_random_order_is_the_mean_over_all_places(loss: str, expected: float) -> None:
    values = random_order(params(loss), [4, 12])
    assert values["recall_at_1"].tolist() == pytest.approx([1 / 4, 1 / 12])
    assert values["recall_at_10"].tolist() == pytest.approx([1, 10 / 12])
    assert values["mrr_at_10"][0].item() == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert values["loss"][0].item() == pytest.approx(expected)


def test_a_row_has_the_tokens_of_all_its_pairs() -> None:
    assert pair_tokens([{"pairs_input_ids": [[1, 2], [3]]}]) == [3]
