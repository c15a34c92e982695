"""The contrastive loss against its formula and Sentence Transformers, and pooling against loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore import ConfigError
from peftcore.train import Contrastive, false_negatives, pool
from peftcore.train.contrastive import CHUNK


def vectors(rows: int, negatives: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random embeddings of queries, positives and negatives in float64, not of unit length."""
    generator = torch.Generator().manual_seed(0)
    sizes = (rows, rows, negatives)
    return tuple(torch.randn(size, 8, dtype=torch.float64, generator=generator) for size in sizes)  # type: ignore[return-value]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_is_the_formula(symmetric: bool) -> None:
    queries, positives, negatives = vectors(5, 3)
    losses = Contrastive(scale=3.0, symmetric=symmetric).losses(queries, positives, negatives)
    passages = [*positives, *negatives]
    for i in range(5):
        own = math.exp(3.0 * float(queries[i] @ positives[i]))
        forward = -math.log(own / sum(math.exp(3.0 * float(queries[i] @ passage)) for passage in passages))
        backward = -math.log(own / sum(math.exp(3.0 * float(query @ positives[i])) for query in queries))
        assert losses[i].item() == pytest.approx((forward + backward) / 2 if symmetric else forward)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [0, 2])
def test_the_loss_and_its_gradients_are_those_of_sentence_transformers(symmetric: bool, columns: int) -> None:
    module = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses", reason="a comparison; the loss itself does not need it"
    )
    directions: tuple[Any, ...] = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    options = {"scale": 20.0, "directions": directions, "partition_mode": "per_direction"}
    theirs = module.MultipleNegativesRankingLoss(torch.nn.Identity(), **options)
    embeddings = [each.requires_grad_() for each in torch.randn(2 + columns, 6, 8, dtype=torch.float64).unbind()]
    embeddings = [each.detach().requires_grad_() for each in embeddings]
    expected = theirs.compute_loss_from_embeddings(embeddings, torch.empty(0))
    gradients = torch.autograd.grad(expected, embeddings)
    queries, positives, *negatives = (F.normalize(each, dim=-1) for each in embeddings)
    hard = torch.cat(negatives) if negatives else None
    losses = Contrastive(scale=20.0, symmetric=symmetric).losses(queries, positives, hard)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(losses.mean(), embeddings), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_many_queries_have_the_losses_of_one_matrix(symmetric: bool) -> None:
    rows = CHUNK + 3
    queries, positives, negatives = vectors(rows, 4)
    masked = torch.zeros(rows, rows + 4, dtype=torch.bool)
    masked[CHUNK + 1, 2] = masked[3, rows + 1] = True
    losses = Contrastive(scale=1.0, symmetric=symmetric).losses(queries, positives, negatives, masked)
    scores = (queries @ torch.cat([positives, negatives]).T).masked_fill(masked, -torch.inf)
    expected = scores.logsumexp(1) - scores.diagonal()
    if symmetric:
        expected = (expected + scores[:, :rows].logsumexp(0) - scores.diagonal()) / 2
    torch.testing.assert_close(losses, expected)


def test_right_answers_of_other_rows_are_no_negatives() -> None:
    # rows 0 and 2 ask the same; rows 1 and 3 have the same passage; the negative of row 0 is row 1's passage
    queries, positives, negatives = torch.tensor([1, 2, 1, 3]), torch.tensor([10, 11, 12, 11]), torch.tensor([11, 20])
    expected = torch.zeros(4, 6, dtype=torch.bool)
    for query, passages in {0: [2], 1: [3, 4], 2: [0], 3: [1, 4]}.items():
        expected[query, passages] = True
    assert torch.equal(false_negatives(queries, positives, negatives), expected)


def test_a_masked_passage_neither_counts_nor_gets_gradients() -> None:
    queries, positives, _ = vectors(3)
    masked = torch.tensor([[False, True, False], [False, False, False], [False, False, False]])
    positives.requires_grad_()
    loss = Contrastive(scale=1.0).losses(queries, positives, masked=masked)[0]
    alone = Contrastive(scale=1.0).losses(queries[[0, 2]], positives[[0, 2]])[0]
    assert loss.item() == pytest.approx(alone.item())
    assert not torch.autograd.grad(loss, positives)[0][1].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_reads_tokens_and_no_padding(side: str) -> None:
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]] if side == "right" else [[1, 1, 1, 1], [0, 0, 1, 1]])
    tokens = hidden[1, :2] if side == "right" else hidden[1, 2:]
    for pooling, expected in (("mean", tokens.mean(0)), ("cls", tokens[0]), ("last", tokens[1])):
        vector = pool(hidden, mask, pooling, normalize=False)  # type: ignore[arg-type]
        torch.testing.assert_close(vector[1], expected)
        unit = pool(hidden, mask, pooling)  # type: ignore[arg-type]
        torch.testing.assert_close(unit, vector / vector.norm(dim=-1, keepdim=True))


def test_half_precision_is_pooled_to_single() -> None:
    assert pool(torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2)).dtype == torch.float32


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="pooling must be one of mean, cls, last; got 'max'"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), "max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scale must be above 0, such as 20; got 0"):
        Contrastive(scale=0)
