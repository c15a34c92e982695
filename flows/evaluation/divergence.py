"""Divergence of the base and the adapter from the teacher of `train.distillation` on held-out rows."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.base.model import device
from flows.data.rows import Row
from flows.evaluation.result import EvaluationResult
from flows.evaluation.scoring import by_length
from flows.params import Params
from flows.paths import Paths
from flows.runtime.progress import progress
from flows.training.objectives import distillation_of
from flows.training.teacher_files import check_teacher, load_other_model
from peftcore.train import RightPaddingCollator, reference_acting, row_sums, supervised_logits, supervised_positions

TEACHER = "teacher"
"""Name of the teacher's adapter beside the evaluated one."""


def with_divergence(
    result: EvaluationResult,
    params: Params,
    paths: Paths,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
) -> EvaluationResult:
    """Return the result with each row's mean divergence from the teacher (nats per supervised token).

    The table gets the columns `base_divergence` and `adapter_divergence`. Both sides of the metrics get the figure
    `divergence`, the mean over rows.

    Args:
        result: The evaluation of the same rows.
        params: The parameters of the run, which name a teacher.
        paths: The project's files.
        model: A PeftModel; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        rows: Prepared chats of the test split.
    """
    values = divergences(params, paths, model, tokenizer, rows)
    table, metrics = result.table, dict(result.metrics)
    for side, of_rows in values.items():
        table = table.append_column(f"{side}_divergence", pa.array(of_rows, pa.float64()))
        metrics[side] = metrics[side] | {"divergence": sum(of_rows) / len(of_rows)}
    return replace(result, metrics=metrics, table=table)


@torch.no_grad()
def divergences(
    params: Params, paths: Paths, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> dict[str, list[float]]:
    """Return {"base": divergence of each row, "adapter": divergence of each row}; see `with_divergence`."""
    distillation, batch_size = distillation_of(params), params.evaluate.batch_size
    collate = RightPaddingCollator(padding_id(tokenizer))
    values: dict[str, list[float]] = {side: [0.0] * len(rows) for side in ("base", "adapter")}
    with _teacher(params, paths, model) as teacher, progress(len(rows), "divergence from the teacher", "row") as bar:
        for batch in by_length([len(row["input_ids"]) for row in rows], batch_size, model.device):
            columns = collate([{name: rows[i][name] for name in ("input_ids", "labels")} for i in batch])
            inputs = {name: tensor.to(model.device) for name, tensor in columns.items()}
            mask = supervised_positions(inputs.pop("labels"))
            with teacher() as acting:
                expected = supervised_logits(acting, inputs, mask)
            for side, context in (("base", model.disable_adapter()), ("adapter", contextlib.nullcontext())):
                with context:
                    tokens = distillation.divergences(supervised_logits(model, inputs, mask), expected)
                sums, counts = row_sums(tokens.double(), mask)
                for i, mean in zip(batch, (sums / counts).tolist(), strict=True):
                    values[side][i] = mean
            bar.update(len(batch))
    return values


@contextlib.contextmanager
def _teacher(params: Params, paths: Paths, model: Any) -> Iterator[Any]:
    """Yield a function of a context in which the model that it yields computes the teacher's outputs."""
    distillation = params.train.distillation
    assert distillation.teacher is not None
    if distillation.version is None and distillation.teacher != "base":
        other = load_other_model(distillation.teacher, paths).to(device()).eval()
        yield lambda: contextlib.nullcontext(other)
        return
    if distillation.version is None:
        yield lambda: _acting(model, None)
        return
    check_teacher(params, paths)
    model.load_adapter(paths.teacher_adapter, TEACHER)
    try:
        yield lambda: _acting(model, TEACHER)
    finally:
        model.delete_adapter(TEACHER)


@contextlib.contextmanager
def _acting(model: nn.Module, adapter: str | None) -> Iterator[nn.Module]:
    with reference_acting(model, adapter):
        yield model
