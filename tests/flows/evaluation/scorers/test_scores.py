"""Scores as columns and figures of an evaluation, and rows on which a scorer fails."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flows.errors import StageError
from flows.evaluation.result import EvaluationResult
from flows.evaluation.scorers.scores import ScoredAnswer, score_answers, with_scores
from flows.params import Scorer

ROWS = [
    {"id": f"row{n}", "slice": "even" if n % 2 == 0 else "odd", "prompt": f"p{n}", "input_ids": [1], "labels": [1]}
    for n in range(5)
]
ANSWERS = {"base": ["1", "x", "3", None, None], "adapter": ["1", "2", "3", None, None]}


def evaluation(answers: dict[str, list[str | None]] = ANSWERS) -> EvaluationResult:
    columns: dict[str, Any] = {"id": [row["id"] for row in ROWS], "slice": [row["slice"] for row in ROWS]}
    columns |= {"reference": ["1", "2", "3", None, None]}
    columns |= {f"{side}_answer": values for side, values in answers.items()}
    sides: dict[str, Any] = {side: {"loss": 1.0} for side in ("base", "adapter", "gain")}
    slices = {"even": {"rows": 3}, "odd": {"rows": 2}}
    return EvaluationResult(sides | {"slices": slices}, pa.table(columns), [])


def number(prompt: str, answer: str, reference: str, row: dict[str, Any]) -> float:
    return float(answer)


def scored(score: Any, **entry: Any) -> EvaluationResult:
    return with_scores(evaluation(), {"n": (Scorer(scorer="length", name="n", **entry), score)}, ROWS, Path())


def test_a_scorer_is_a_column_and_a_figure() -> None:
    result = scored(lambda prompt, answer, reference, row: answer == reference)
    assert result.table["base_n"].to_pylist() == [1.0, 0.0, 1.0, None, None]
    assert result.table["adapter_n"].to_pylist() == [1.0, 1.0, 1.0, None, None]
    metrics = result.metrics
    assert metrics["base"] == {"loss": 1.0, "n": pytest.approx(2 / 3)} and metrics["adapter"]["n"] == 1
    assert metrics["gain"] == {"loss": 1.0, "n": pytest.approx(1 / 3)}
    assert metrics["slices"] == {
        "even": {"rows": 3, "base_n": 1.0, "adapter_n": 1.0},
        "odd": {"rows": 2, "base_n": 0.0, "adapter_n": 1.0},
    }
    assert metrics["scorers"]["n"] == {
        **{"scorer": "length", "options": {}, "on_error": "stop", "files": {}},
        **{"answers": 3, "failures": {"base": 0, "adapter": 0}, "first_failure": None},
    }


def test_a_scorer_gets_the_row_without_its_tokens() -> None:
    told: list[Any] = []
    scored(lambda *arguments: told.append(arguments) or 0)
    assert told[1] == ("p1", "x", "2", {"id": "row1", "slice": "odd", "prompt": "p1"})


def test_a_scorer_gets_the_extra_columns_by_their_names() -> None:
    row = {"id": "1", "prompt": "p", "extra": '{"tests": "assert True", "level": 3}'}
    told: list[Any] = []
    score_answers(
        Scorer(scorer="length"), lambda *arguments: told.append(arguments[3]) or 0, [ScoredAnswer(row, "a", "b")], ""
    )
    assert told == [{"id": "1", "prompt": "p", "tests": "assert True", "level": 3}]


def test_a_failure_stops_with_its_count() -> None:
    with pytest.raises(
        StageError, match="n failed on 1 of 3 answers of the base, first on row row1: ValueError: could"
    ):
        scored(number)


@pytest.mark.parametrize(("policy", "value", "mean"), [("skip", None, 2.0), (-1, -1.0, 1.0)])
def test_a_failure_gets_what_the_policy_says_and_is_counted(policy: Any, value: float | None, mean: float) -> None:
    result = scored(number, on_error=policy)
    assert result.table["base_n"].to_pylist() == [1.0, value, 3.0, None, None]
    assert result.metrics["base"]["n"] == mean
    record = result.metrics["scorers"]["n"]
    assert record["failures"] == {"base": 1, "adapter": 0} and record["on_error"] == policy
    assert record["first_failure"].startswith("row row1: ValueError: could not convert")


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", [1.0]])
def test_anything_but_a_finite_number_is_a_failure(value: Any) -> None:
    result = scored(lambda *arguments: value, on_error="skip")
    assert result.metrics["scorers"]["n"]["failures"] == {"base": 3, "adapter": 3}
    assert result.metrics["adapter"]["n"] is None and result.metrics["gain"]["n"] is None


def test_without_scorers_nothing_changes() -> None:
    result = evaluation()
    assert with_scores(result, {}, ROWS, Path()) is result


def test_a_classifiers_answers_are_its_classes() -> None:
    columns = {"slice": ["a", "a"], "label": ["yes", "no"], "base_prediction": ["yes"] * 2}
    result = EvaluationResult(
        {side: {"loss": 1.0} for side in ("base", "adapter", "gain")} | {"slices": {"a": {"rows": 2}}},
        pa.table(columns | {"adapter_prediction": ["yes", "no"]}),
        [],
    )
    rows = [{"id": "1", "text": "one"}, {"id": "2", "text": "two"}]
    cost = (Scorer(scorer="length", name="cost"), lambda prompt, answer, reference, row: answer != reference)
    scores = with_scores(result, {"cost": cost}, rows, Path())
    assert scores.metrics["base"]["cost"] == 0.5 and scores.metrics["adapter"]["cost"] == 0
