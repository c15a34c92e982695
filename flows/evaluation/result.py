"""Result of an evaluation: metrics, a table of rows, and samples."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from flows.data.rows import Row
from flows.evaluation.scoring import RowLosses

log = logging.getLogger(__name__)
COMMON = (
    ("id", pa.string()),
    ("slice", pa.string()),
    ("tokens", pa.int32()),
    ("weight", pa.float64()),
    ("base_loss", pa.float64()),
    ("adapter_loss", pa.float64()),
)
"""Columns at the start of every table; weight: a row's weight in the mean loss."""


@dataclass(frozen=True)
class EvaluationResult:
    """The results of an evaluation.

    Attributes:
        metrics: Content of metrics.json. "baseline" names what stands for a base without a trained head.
        table: Content of rows.parquet, one row per test row.
        samples: Content of samples.json: some prompts with the reference answer and both models' answers.
    """

    metrics: dict[str, Any]
    table: pa.Table
    samples: list[dict[str, str]]


def common_columns(rows: Sequence[Row], base: RowLosses, adapter: RowLosses) -> list[dict[str, Any]]:
    """Return the COMMON columns of each row, as one dictionary per row."""
    return [
        {
            "id": row["id"],
            "slice": row["slice"],
            "tokens": base.tokens[i],
            "weight": base.weights[i],
            "base_loss": base.means[i],
            "adapter_loss": adapter.means[i],
        }
        for i, row in enumerate(rows)
    ]


def common_metrics(
    rows: Sequence[Row],
    losses: Mapping[str, RowLosses],
    base: Mapping[str, float],
    adapter: Mapping[str, float],
    gains: Sequence[str],
) -> dict[str, Any]:
    """Return the metrics of base and adapter, the gain of the adapter in each, and the losses of each slice.

    The losses of a slice are None if all its rows have weight 0; a warning names such slices.

    Args:
        rows: The test rows.
        losses: {"base": losses of the rows, "adapter": losses of the rows}.
        base: Metrics of the base.
        adapter: Metrics of the adapter.
        gains: Names of metrics that are better if they are higher. Their gain is adapter minus base; the loss's gain is
            base minus adapter.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        members[row["slice"]].append(i)
    slices = {name: _slice_losses(losses, indices) for name, indices in sorted(members.items())}
    if weightless := [name for name, figures in slices.items() if figures["base_loss"] is None]:
        log.warning(
            "slices without a test loss, because all their rows have weight 0: %s",
            ", ".join(name or "rows without a slice" for name in weightless),
        )
    return {
        "base": dict(base),
        "adapter": dict(adapter),
        "gain": {"loss": base["loss"] - adapter["loss"], **{name: adapter[name] - base[name] for name in gains}},
        "rows": len(rows),
        "slices": slices,
    }


def _slice_losses(losses: Mapping[str, RowLosses], indices: Sequence[int]) -> dict[str, Any]:
    means = {f"{side}_loss": losses[side].of(indices).loss for side in ("base", "adapter")}
    return {"rows": len(indices), **{name: None if math.isnan(mean) else mean for name, mean in means.items()}}


def prediction_samples(rows: Sequence[Row], table: Sequence[Row]) -> list[dict[str, str]]:
    """Return the samples of a classifier. table: the first rows of the evaluation's table, with both predictions."""
    return [
        {
            "id": row["id"],
            "slice": row["slice"],
            "prompt": rows[i]["text"],
            "reference": row["label"],
            "base": row["base_prediction"],
            "adapter": row["adapter_prediction"],
        }
        for i, row in enumerate(table)
    ]
