"""The evidence: files as they were registered, and figures that follow from their rows."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from gate_cases import judge, reason

from flows.gate.candidate import Candidate
from flows.gate.checks.evidence import evidence

SIDES = ("base", "adapter", "gain")


@pytest.mark.parametrize("file", ["metrics.json", "rows.parquet", "control.parquet", "merge.json"])
def test_evidence_that_was_changed_after_registering_is_named(make: Callable[..., Candidate], file: str) -> None:
    candidate = make()
    path = next(path for path in candidate.evidence if path.name == file)
    path.write_bytes(path.read_bytes() + b" ")
    assert reason(judge(candidate)).startswith(f"evidence: {file} differs from the registered file of v0.2.0")
    unnamed = replace(candidate, evidence={**candidate.evidence, path: None})
    assert f"registered without the SHA-256 of {file}" in reason(judge(unnamed))


@pytest.mark.parametrize(
    ("side", "figure", "value"), [("adapter", "loss", 2.0), ("base", "loss", 9.9), ("adapter", "ended", 0.95)]
)
def test_figures_have_to_follow_from_the_rows(
    make: Callable[..., Candidate], side: str, figure: str, value: float
) -> None:
    """Edited before it was registered, a file has its registered SHA-256."""
    candidate = make()
    metrics = json.loads(json.dumps(candidate.metrics))
    metrics[side][figure] = value
    metrics["gain"]["loss"] = metrics["base"]["loss"] - metrics["adapter"]["loss"]
    record = {**candidate.record, "metrics": {**candidate.record["metrics"], **{p: metrics[p] for p in SIDES}}}
    text = reason(judge(replace(candidate, metrics=metrics, record=record)))
    assert text.startswith(f"evidence: metrics.json says {side}.{figure} {value:g}, and its rows give")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gain": {"loss": 3.0, "rouge_l": 0.15}}, "gain.loss 3"),
        ({"rows": 400}, "rows 400"),
        ({"slices": {"json": {"rows": 40, "base_loss": 3.8, "adapter_loss": 2.7}}}, "slices json"),
        ({"control": {"base_loss": 3.0, "adapter_loss": 2.0, "rows": 8}}, "control.adapter_loss 2"),
    ],
)
def test_so_have_gains_slices_and_the_control_set(
    make: Callable[..., Candidate], change: dict[str, Any], told: str
) -> None:
    assert f"metrics.json says {told}" in reason(judge(make(**change)))


def test_a_record_that_tells_other_figures_is_refused(make: Callable[..., Candidate]) -> None:
    candidate = make()
    lying = replace(candidate, record={**candidate.record, "evaluation_set": "0" * 64})
    assert reason(judge(lying)).startswith("evidence: the record of v0.2.0 says evaluation_set 0000")


def test_rows_with_a_weight_of_their_own_weigh_by_it(make: Callable[..., Candidate]) -> None:
    candidate = make()
    assert evidence(candidate)[0]
    heavy = candidate.rows.append_column("weight", [[100.0] + [1.0] * 39])
    passed, detail = evidence(replace(candidate, rows=heavy))
    assert not passed and detail.startswith("metrics.json says adapter.loss 2.7, and its rows give")


def test_a_figure_without_a_column_is_refused(make: Callable[..., Candidate]) -> None:
    candidate = make()
    rows = candidate.rows.drop_columns(["adapter_rouge_l"])
    _, detail = evidence(replace(candidate, rows=rows))
    assert detail.startswith("metrics.json says adapter.rouge_l 0.31, for which rows.parquet has no column")


def test_the_first_fault_is_told_and_the_others_are_counted(make: Callable[..., Candidate]) -> None:
    candidate = make()
    gone = replace(candidate, evidence=dict.fromkeys(candidate.evidence, "0" * 64))
    _, detail = evidence(gone)
    assert detail.count("differs from the registered file") == 1
    assert detail.endswith(f"(and {len(candidate.evidence) - 1} more)")


def test_a_loss_of_rows_without_weight_is_nan_on_both_sides(make: Callable[..., Candidate]) -> None:
    candidate = make(slices={})
    rows = candidate.rows.append_column("weight", [[0.0] * 40])
    nan = {side: candidate.metrics[side] | {"loss": float("nan")} for side in ("base", "adapter")}
    nan["gain"] = candidate.metrics["gain"] | {"loss": float("nan")}
    record = {**candidate.record, "metrics": candidate.record["metrics"] | nan}
    assert evidence(replace(candidate, rows=rows, metrics={**candidate.metrics, **nan}, record=record))[0]


@pytest.mark.parametrize(
    ("columns", "right"),
    [
        ({"adapter_margin": [0.5] * 30 + [0.0] * 10}, 0.75),
        ({"adapter_margin": [0.0] * 40, "adapter_accuracy": [1.0] * 20 + [0.5] * 20}, 0.75),
        ({"label": ["warm"] * 40, "adapter_prediction": ["warm"] * 10 + ["cold"] * 30}, 0.25),
    ],
)
def test_accuracy_follows_from_margins_or_predictions(
    make: Callable[..., Candidate], columns: dict[str, Any], right: float
) -> None:
    """A margin of 0 prefers neither answer; a column of accuracies counts as it is."""
    candidate = make()
    rows = candidate.rows.drop_columns(["label", "base_prediction", "adapter_prediction"])
    for name, values in columns.items():
        rows = rows.append_column(name, [values])
    for accuracy, passes in ((right, True), (right + 0.025, False)):
        side = candidate.metrics["adapter"] | {"accuracy": accuracy}
        record = {**candidate.record, "metrics": candidate.record["metrics"] | {"adapter": side}}
        changed = replace(candidate, rows=rows, metrics={**candidate.metrics, "adapter": side}, record=record)
        assert evidence(changed)[0] is passes
