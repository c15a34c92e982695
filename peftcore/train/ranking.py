"""Metrics of rankings with one right passage each: recall@k, reciprocal rank and normalised discounted gain.

For a right passage at rank r, counted from 1:

    recall@k = [r ≤ k],    MRR@k = [r ≤ k] / r,    nDCG@k = [r ≤ k] / log2(1 + r)

Shapes: Q queries, P passages, D dimensions.
"""

import torch
from torch import Tensor

RANKING_METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr_at_10", "ndcg_at_10")
"""Names of the metrics."""
_CHUNK = 512  # queries whose similarities are in memory at the same time


def ranks(scores: Tensor, right: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Return the rank of each query's right passage, (Q,), from 1.

    A passage with the same score as the right one counts as ranked before it, and so does one whose score is NaN.

    Args:
        scores: Scores of the passages (Q, P).
        right: Index of the right passage (Q,).
        excluded: True for passages that do not take part in a query's ranking (Q, P); None: all take part.
    """
    before = ~(scores < scores.gather(1, right[:, None]))
    if excluded is not None:
        before &= ~excluded
    before.scatter_(1, right[:, None], False)
    return before.sum(1) + 1


def retrieval_ranks(queries: Tensor, passages: Tensor, right: Tensor, answers: list[list[int]]) -> Tensor:
    """Return the rank of each query's right passage among all passages by dot product, (Q,).

    Args:
        queries: Embeddings (Q, D).
        passages: Embeddings of different passages (P, D).
        right: Index of each query's right passage (Q,).
        answers: Indices of all right passages of each query; the others of them take no part in its ranking.
    """
    parts = [right.new_zeros(0)]
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores = queries[rows] @ passages.T
        excluded = torch.zeros_like(scores, dtype=torch.bool)
        for row, others in enumerate(answers[rows]):
            excluded[row, others] = True
        parts.append(ranks(scores, right[rows], excluded))
    return torch.cat(parts)


def ranking_metrics(rank: Tensor) -> dict[str, Tensor]:
    """Return {name of RANKING_METRICS: value of each query in float64 (Q,)} for ranks (Q,)."""
    rank = rank.double()
    metrics = {f"recall_at_{k}": (rank <= k).double() for k in (1, 5, 10)}
    in_ten = metrics["recall_at_10"]
    return metrics | {"mrr_at_10": in_ten / rank, "ndcg_at_10": in_ten / torch.log2(1 + rank)}
