"""Ranks and their metrics against definitions, ranx-style examples and sorting."""

import math

import pytest
import torch

from peftcore.train import RANKING_METRICS, ranking_metrics, ranks, retrieval_ranks


def test_metrics_of_known_ranks() -> None:
    metrics = ranking_metrics(torch.tensor([1, 3, 10, 11]))
    assert set(metrics) == set(RANKING_METRICS)
    assert metrics["recall_at_1"].tolist() == [1, 0, 0, 0]
    assert metrics["recall_at_5"].tolist() == [1, 1, 0, 0]
    assert metrics["recall_at_10"].tolist() == [1, 1, 1, 0]
    assert metrics["mrr_at_10"].tolist() == pytest.approx([1, 1 / 3, 0.1, 0])
    assert metrics["ndcg_at_10"].tolist() == pytest.approx([1, 1 / math.log2(4), 1 / math.log2(11), 0])


def test_ndcg_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="a comparison; the metric itself does not need it")
    scores, right = torch.rand(6, 20, dtype=torch.float64), torch.arange(6)
    relevance = torch.nn.functional.one_hot(right, 20)
    ours = ranking_metrics(ranks(scores, right))["ndcg_at_10"]
    for row in range(6):
        theirs = metrics.ndcg_score(relevance[row : row + 1].numpy(), scores[row : row + 1].numpy(), k=10)
        assert ours[row].item() == pytest.approx(theirs)


def test_ranks_are_places_in_the_sorted_list_and_equal_scores_get_no_credit() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3], [float("nan"), 0.2, 0.1, 0.0]])
    assert ranks(scores, torch.tensor([1, 0, 1])).tolist() == [1, 4, 2]
    assert ranks(scores, torch.tensor([2, 3, 0])).tolist() == [3, 4, 4]
    excluded = torch.tensor([[False, True, False, False], [True, True, False, False], [True, False, False, False]])
    assert ranks(scores, torch.tensor([2, 3, 1]), excluded).tolist() == [2, 2, 1]


def test_retrieval_leaves_out_other_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.train.ranking._CHUNK", 2)
    passages = torch.eye(4)
    queries = torch.tensor([[0.9, 0.8, 0.0, 0.1], [0.9, 0.8, 0.0, 0.1], [0.0, 0.0, 0.2, 0.9]])
    right = torch.tensor([0, 1, 2])
    alone = [[0], [1], [2]]
    assert retrieval_ranks(queries, passages, right, alone).tolist() == [1, 2, 2]
    assert retrieval_ranks(queries, passages, right, [[0, 1], [0, 1], [2]]).tolist() == [1, 1, 2]
