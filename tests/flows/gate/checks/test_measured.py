"""The rules say what has to be measured; a version that was measured by less is refused, whatever its author chose."""

from pathlib import Path
from typing import Any

import pytest

from flows.gate.checks.measured import unmeasured
from flows.params import Params

CONTROL = {"base_loss": 3.0, "adapter_loss": 2.9, "rows": 48}


def found(metrics: dict[str, Any] | None = None, rules: dict[str, Any] | None = None, **changes: dict[str, Any]) -> str:
    """What is missing from a version whose parameters are the defaults but for `changes`."""
    params = Params.model_validate({"data": {"source": "rows.jsonl", "slice_column": "lang"}} | (rules or {}))
    record = {"params": params.model_dump()}
    for section, keys in changes.items():
        record["params"][section] |= keys
    return "; ".join(unmeasured(record, {"control": CONTROL} if metrics is None else metrics, params, Path()))


def test_a_version_measured_by_the_rules_is() -> None:
    assert found() == ""
    assert found(evaluate={"rows": None, "generate_rows": 200, "batch_size": 1}, data={"similarity": 0.5}) == ""


def test_a_null_control_set_does_not_skip_the_limit_on_forgetting() -> None:
    nothing = {"source": None, "rows": 48, "max_length": 128}
    told = "evaluate.control.source null, and the rules have stdlib:topics"
    assert told in found({"control": None}, evaluate={"control": nothing})
    assert "no losses on the control set" in found({"control": None})
    few = {"source": "stdlib:topics", "rows": 2, "max_length": 8}
    assert "evaluate.control.rows 2, and the rules have at least 48" in found(evaluate={"control": few})
    assert "evaluate.control.source null" in found({}, evaluate={"control": None}), "a version from before control sets"
    assert found({"control": None}, {"gate": {"max_forgetting": None}}, evaluate={"control": nothing}) == ""


def test_a_null_slice_column_does_not_hide_a_minority() -> None:
    assert "data.slice_column null, and the rules have" in found(
        rules={"data": {"source": "rows.jsonl", "slice_column": "lang"}}, data={"slice_column": None}
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "test_rows", 5),
        ("evaluate", "rows", 20),
        ("evaluate", "generate_rows", 2),
        ("merge", "rows", 1),
        ("data", "near_duplicates", "keep"),
        ("data", "max_leakage", 0.9),
        ("data", "similarity", 1.0),
        ("train", "objective", "classification"),
    ],
)
def test_nor_do_fewer_rows_leaks_or_another_objective(section: str, key: str, value: Any) -> None:
    assert f"{section}.{key} {value}, and the rules have" in found(**{section: {key: value}})


RULED = {"evaluate": {"scorers": ["token_f1", "length"]}, "gate": {"rules": [{"metric": "token_f1", "limit": 0.5}]}}
MEASURED = {"scorer": "token_f1", "options": {}, "on_error": "stop", "files": {}}


@pytest.mark.parametrize(
    ("scorers", "missing"),
    [
        ({"token_f1": MEASURED | {"answers": 8}}, ""),
        ({}, "it was evaluated without the scorer token_f1 of the rules"),
        (
            {"token_f1": MEASURED | {"on_error": 1.0}},
            "it was evaluated with on_error of the scorer token_f1 1.0, and the rules have stop",
        ),
        (
            {"token_f1": MEASURED | {"scorer": "length"}},
            "it was evaluated with scorer of the scorer token_f1 length, and the rules have token_f1",
        ),
    ],
)
def test_the_scorer_of_a_rule_has_to_be_the_same(scorers: dict[str, Any], missing: str) -> None:
    assert found({"control": CONTROL, "scorers": scorers}, RULED) == missing


QUIZ = {"evaluate": {"benchmarks": [{"task": "quiz", "limit": 100}]}, "gate": {"max_benchmark_drop": 0.1}}
IDENTITY = {"task": "quiz", "num_fewshot": None, "limit": 100, "metric": None, "files": {}}


def test_the_benchmark_of_a_limit_has_to_be_the_same() -> None:
    assert found({"control": CONTROL, "benchmarks": {"quiz": {"identity": IDENTITY}}}, QUIZ) == ""
    assert found(rules=QUIZ) == "it was evaluated without the benchmark quiz of the rules"
    fewer = {"quiz": {"identity": IDENTITY | {"limit": 5}}}
    assert "with another form of the benchmark quiz" in found({"control": CONTROL, "benchmarks": fewer}, QUIZ)
    assert found(rules=QUIZ | {"gate": {}}) == "", "without a limit it is shown only"


def test_a_limit_on_calibration_needs_as_many_rows() -> None:
    rules = {"evaluate": {"calibration_rows": 64}, "gate": {"max_calibration_error": 0.1}}
    told = "evaluate.calibration_rows 8, and the rules have at least 64"
    assert told in found(rules=rules, evaluate={"calibration_rows": 8})
    assert found(rules=rules | {"gate": {}}, evaluate={"calibration_rows": 8}) == ""
