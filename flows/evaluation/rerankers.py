"""Evaluation of rerankers: loss and ranking metrics of each test row's passages, of base and adapter.

A base that is no reranker has a random head, which says nothing. Its figures are those of passages in random order, and
its loss that of equal scores.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.data.rows import Row
from flows.evaluation.embeddings import ranking_result
from flows.evaluation.fidelity import Fidelity, Reference
from flows.evaluation.result import EvaluationResult
from flows.evaluation.scoring import by_length
from flows.params import Params
from flows.runtime.progress import progress
from peftcore.train import (
    PAIRS_COLUMN,
    RerankingCollator,
    passage_scores,
    ranking_metrics,
    ranks,
    reranking_losses,
)


@torch.no_grad()
def row_scores(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int, bar: Any = None) -> Tensor:
    """Return the scores of each row's passages (rows, most passages) in float64 on the CPU; -inf for absent ones.

    Args:
        model: A sequence classifier with one output.
        rows: Rows with pairs, the right passage first.
        pad: Token id of padding.
        batch_size: Pairs per forward pass, at least those of one row.
        bar: Progress bar that counts rows.
    """
    most = max(len(row[PAIRS_COLUMN]) for row in rows)
    scores = torch.full((len(rows), most), -torch.inf, dtype=torch.float64)
    collate, device = RerankingCollator(pad), next(model.parameters()).device
    lengths = [max(map(len, row[PAIRS_COLUMN])) for row in rows]
    for batch in by_length(lengths, max(1, batch_size // most)):
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in batch]).items()}
        values = passage_scores(model, inputs).double().cpu()
        scores[batch, : values.shape[1]] = values
        if bar is not None:
            bar.update(len(batch))
    return scores


def ranking_values(params: Params, scores: Tensor) -> dict[str, Tensor]:
    """Return `loss` (nats) and the RANKING_METRICS of each row (rows,), from scores of its passages."""
    first = torch.zeros(len(scores), dtype=torch.long)
    return {"loss": reranking_losses(scores, params.train.reranker.loss), **ranking_metrics(ranks(scores, first))}


def random_order(params: Params, counts: Sequence[int]) -> dict[str, Tensor]:
    """Return the expected values of `ranking_values` for passages in random order.

    Args:
        params: The parameters of the run.
        counts: Number of passages of each row.
    """
    most = max(counts)
    equal = torch.tensor([[0.0] * n + [-torch.inf] * (most - n) for n in counts], dtype=torch.float64)
    of_count = {n: ranking_metrics(torch.arange(1, n + 1)) for n in set(counts)}
    names = next(iter(of_count.values()))
    values = {name: torch.stack([of_count[n][name].mean() for n in counts]) for name in names}
    return {"loss": reranking_losses(equal, params.train.reranker.loss), **values}


def evaluate_rerankers(
    params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], base_ranks: bool
) -> EvaluationResult:
    """Evaluate the model with its adapter, and the base, or passages in random order.

    Args:
        params: The parameters of the run.
        model: A PeftModel over a sequence classifier with one output.
        tokenizer: The base's tokenizer.
        rows: Test rows with pairs.
        base_ranks: The base has a trained head, so that it is evaluated without its adapter.
    """
    pad, size = padding_id(tokenizer), params.evaluate.batch_size
    with progress((1 + base_ranks) * len(rows), "evaluate", "row") as bar:
        values = {"adapter": ranking_values(params, row_scores(model, rows, pad, size, bar))}
        if base_ranks:
            with model.disable_adapter():
                values["base"] = ranking_values(params, row_scores(model, rows, pad, size, bar))
        else:
            values["base"] = random_order(params, [len(row[PAIRS_COLUMN]) for row in rows])
    values = {side: values[side] for side in ("base", "adapter")}
    result = ranking_result(params, rows, values, pair_tokens(rows), [row["positive"] for row in rows])
    return result if base_ranks else replace(result, metrics=result.metrics | {"baseline": "passages in random order"})


def pair_tokens(rows: Sequence[Row]) -> list[int]:
    """Return the tokens of all pairs of each row."""
    return [sum(map(len, row[PAIRS_COLUMN])) for row in rows]


def reranker_fidelity(params: Params, reference: Reference, candidate: nn.Module, bar: Any = None) -> Fidelity:
    """Compare two rerankers: each row is one token, and its prediction the softmax of its passages' scores.

    Args:
        params: The parameters of the run.
        reference: The reference model and its rows, with pairs.
        candidate: The model to compare.
        bar: Progress bar that counts rows.
    """
    rows, size = reference.rows, reference.batch_size

    def predict(model: nn.Module, bar: Any = None) -> Tensor:
        return row_scores(model, rows, reference.pad, size, bar)

    scores = reference.predictions(0, predict), predict(candidate, bar)
    p, q = (each.log_softmax(1) for each in scores)
    divergence = (p.exp() * (p - q).nan_to_num(0.0)).sum(1).mean().item()  # absent passages have -inf in both
    agreement = (p.argmax(1) == q.argmax(1)).double().mean().item()
    reference_loss, loss = (reranking_losses(each, params.train.reranker.loss).mean().item() for each in scores)
    return Fidelity(divergence, agreement, loss, reference_loss, len(rows))
