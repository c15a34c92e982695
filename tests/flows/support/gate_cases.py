"""Candidates and champions to judge, and what the gate says of them."""

from dataclasses import replace
from typing import Any

import numpy
import pyarrow

from flows.gate.candidate import Candidate, Champion
from flows.gate.gate import GateReport, evaluate_gate
from flows.params import Gate, Merge

LATENCY = {
    "base": {"first_token_ms": 60.0, "token_ms": 40.0},
    "adapter": {"first_token_ms": 90.0, "token_ms": 50.0},
}


def control_set(change: float, noise: float = 0.01) -> pyarrow.Table:
    """Eight texts, of which the adapter's losses are the base's and `change`, give or take."""
    base = numpy.linspace(2, 3, 8)
    changes = change + numpy.array([1, -1] * 4) * noise
    return pyarrow.table({"tokens": [100] * 8, "base_loss": base, "adapter_loss": base + changes})


def champion_of(candidate: Candidate) -> Champion:
    metrics = candidate.metrics
    return Champion(candidate.version, metrics["evaluation_set"], metrics["base_model"], candidate.rows)


def with_merge(candidate: Candidate, merge: dict[str, float]) -> Candidate:
    """Registered with this merge."""
    record = {**candidate.record, "metrics": {**candidate.record["metrics"], "merge": merge}}
    return replace(candidate, merge=merge, record=record)


def judge(candidate: Candidate, against: Champion | None = None, /, **gate: Any) -> GateReport:
    return evaluate_gate(candidate, against, Gate(**gate), Merge(), seed=1)


def reason(report: GateReport) -> str:
    """The reason of a refusal, which is what every check that failed says."""
    assert not report.passed
    assert report.reason == "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.passed)
    return report.reason


def check(report: GateReport, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


def of_objective(objective: str, loss_function: str, **figures: float) -> dict[str, Any]:
    sides = {"base": {"loss": 3.8} | figures, "adapter": {"loss": 2.7} | figures}
    return sides | {"gain": {"loss": 1.1}, "objective": objective, "loss_function": loss_function}


SCORER = {"scorer": "token_f1", "options": {}, "on_error": "stop", "files": {}}


def with_scores(candidate: Candidate, adapter: Any, base: float = 0.5, name: str = "token_f1") -> Candidate:
    """Evaluated with one more scorer: these scores of the adapter's 40 rows, and one score of all rows of the base."""
    scores = {"base": numpy.full(40, base), "adapter": numpy.asarray(adapter, float)}
    rows, metrics = candidate.rows, dict(candidate.metrics)
    for side, values in scores.items():
        rows = rows.append_column(f"{side}_{name}", pyarrow.array(values))
        metrics[side] = metrics[side] | {name: float(values.mean())}
    scorers = {name: SCORER | {"answers": 40, "failures": {"base": 0, "adapter": 0}, "first_failure": None}}
    metrics["scorers"] = scorers
    record = {**candidate.record, "metrics": {**candidate.record["metrics"], "scorers": scorers}}
    record["metrics"] |= {side: metrics[side] for side in scores}
    return replace(candidate, rows=rows, metrics=metrics, record=record)


def scored_champion(candidate: Candidate, **changes: Any) -> Champion:
    """The champion that is such a candidate, with the identity of its scorers."""
    return replace(champion_of(candidate), **({"scorers": candidate.metrics["scorers"]} | changes))
