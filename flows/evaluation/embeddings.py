"""Evaluation of text embeddings: loss and retrieval metrics of the test rows, of base and adapter.

The passages of all test rows, positives and negatives, are each query's candidates. Equal passages count once. Other
right answers to a query take no part in its ranking.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.data.rows import Row, row_weights
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics
from flows.evaluation.scoring import RowLosses, by_length
from flows.params import Params
from flows.runtime.progress import progress
from flows.training.objectives.embedding import contrastive_loss
from peftcore.train import RANKING_METRICS, Pooling, RightPaddingCollator, embed, evaluate_texts

RANKING_COLUMNS = tuple((f"{side}_{name}", pa.float64()) for side in ("base", "adapter") for name in RANKING_METRICS)
"""Columns after the common ones: the metrics of each row."""


@torch.no_grad()
def embeddings(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    pad: int,
    batch_size: int,
    pooling: Pooling,
    normalize: bool,
    bar: Any = None,
) -> Tensor:
    """Return the embeddings of texts (texts, dimensions) in float32 on the CPU.

    Args:
        model: An encoder or decoder without a head.
        texts: Token ids of each text.
        pad: Token id of padding.
        batch_size: Texts per forward pass.
        pooling: mean, cls or last.
        normalize: Embeddings are unit vectors.
        bar: Progress bar that counts texts.
    """
    collate, device = RightPaddingCollator(pad), next(model.parameters()).device
    results: list[Tensor | None] = [None] * len(texts)
    for batch in by_length([len(ids) for ids in texts], batch_size, device):
        inputs = collate([{"input_ids": texts[i], "labels": []} for i in batch])
        ids, mask = (inputs[name].to(device) for name in ("input_ids", "attention_mask"))
        for i, vector in zip(batch, embed(model, ids, mask, pooling, normalize).float().cpu(), strict=True):
            results[i] = vector
        if bar is not None:
            bar.update(len(batch))
    return torch.stack([one for one in results if one is not None])


def texts_of(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """Return the token ids of all texts of the rows: queries, positives, then negatives."""
    texts = [tuple(row[name]) for name in ("query_input_ids", "positive_input_ids") for row in rows]
    return texts + [tuple(ids) for row in rows for ids in row["negatives_input_ids"]]


def retrieval_values(
    params: Params, model: nn.Module, rows: Sequence[Row], pad: int, bar: Any = None
) -> dict[str, Tensor]:
    """Return `loss` (nats) and the RANKING_METRICS of each row, (rows,) in float64.

    Args:
        params: The parameters of the run.
        model: An encoder or decoder without a head.
        rows: Prepared rows of queries.
        pad: Token id of padding.
        bar: Progress bar that counts texts.
    """
    options, texts, count = params.train.embedding, texts_of(rows), len(rows)
    number_of = {text: number for number, text in enumerate(dict.fromkeys(texts))}  # equal texts are embedded once
    size = params.evaluate.batch_size
    vectors = embeddings(model, list(number_of), pad, size, options.pooling, options.normalize, bar)
    keys = torch.tensor([number_of[text] for text in texts])
    queries, positives, negatives = (keys[:count], keys[count : 2 * count], keys[2 * count :])
    contrastive = contrastive_loss(params)
    return evaluate_texts(
        contrastive, vectors[queries], vectors[positives], queries, positives, vectors[negatives], negatives
    )


def row_tokens(rows: Sequence[Row]) -> list[int]:
    """Return the tokens of each row's query and positive."""
    return [len(row["query_input_ids"]) + len(row["positive_input_ids"]) for row in rows]


def evaluate_embeddings(
    params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> EvaluationResult:
    """Evaluate the model with and without its adapter.

    Args:
        params: The parameters of the run.
        model: A PeftModel over a base without a head.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
    """
    pad, values = padding_id(tokenizer), {}
    with progress(2 * len(set(texts_of(rows))), "evaluate", "text") as bar:
        for side, context in (("base", model.disable_adapter()), ("adapter", nullcontext())):
            with context:
                values[side] = retrieval_values(params, model, rows, pad, bar)
    return ranking_result(params, rows, values, row_tokens(rows), [row["positive"] for row in rows])


def ranking_result(
    params: Params,
    rows: list[Row],
    values: dict[str, dict[str, Tensor]],
    tokens: list[int],
    references: list[str],
) -> EvaluationResult:
    """Return the result of an evaluation whose rows have ranks.

    Args:
        params: The parameters of the run.
        rows: Prepared rows of the test split.
        values: {"base" and "adapter": {"loss" and RANKING_METRICS: value of each row}}.
        tokens: Tokens of each row.
        references: The right passage of each row.
    """
    weights = row_weights(rows)
    losses = {side: RowLosses(each["loss"].tolist(), tokens, weights) for side, each in values.items()}
    sides = {
        side: {"loss": losses[side].loss, **{name: each[name].mean().item() for name in RANKING_METRICS}}
        for side, each in values.items()
    }
    metrics = common_metrics(rows, losses, sides["base"], sides["adapter"], list(RANKING_METRICS))
    table = common_columns(rows, losses["base"], losses["adapter"])
    for name in RANKING_METRICS:
        for side, each in values.items():
            for row, value in zip(table, each[name].tolist(), strict=True):
                row[f"{side}_{name}"] = value
    samples = [
        {
            "id": row["id"],
            "slice": row["slice"],
            "prompt": row["query"],
            "reference": reference,
            **{side: _place(float(values[side]["mrr_at_10"][i])) for side in ("base", "adapter")},
        }
        for i, (row, reference) in enumerate(zip(rows[: params.evaluate.samples], references, strict=False))
    ]
    schema = pa.schema([*COMMON, *RANKING_COLUMNS])
    return EvaluationResult(metrics, pa.Table.from_pylist(table, schema=schema), samples)


def _place(reciprocal_rank: float) -> str:
    return f"rank {round(1 / reciprocal_rank)}" if reciprocal_rank else "not among the first 10"
