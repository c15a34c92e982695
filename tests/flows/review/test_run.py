"""A run of a comparison: its figures as JSON, its curves, and its evaluation that was tracked as another run."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from compared_runs import run

from flows.review.run import Run, flat, joined, number, series


def test_an_evaluation_belongs_to_the_run_that_it_names() -> None:
    trained = run("t", None)
    evaluation = Run("e", "e", "e", config={"evaluates": "t"}, summary={"adapter.loss": 2.0}, version="v0.1.0")
    orphan = Run("o", "o", "o", config={"evaluates": "gone"})
    one, other = joined([evaluation, trained, orphan])
    assert (one.id, one.summary, one.version, one.config) == ("t", {"adapter.loss": 2.0}, "v0.1.0", trained.config)
    assert other.id == "o"


def test_a_run_that_names_itself_is_kept() -> None:
    assert [one.id for one in joined([Run("a", "a", "a", config={"evaluates": "a"})])] == ["a"]


def test_series_leave_out_what_is_no_finite_number() -> None:
    rows = [{"s": 2, "x": 1.5, "y": True, "z": "NaN"}, {"s": 1, "x": float("inf")}, {"x": 9.0}, {"s": 2, "x": 2.5}]
    assert series(rows, "s") == {"x": [(2, 2.5)]}


def test_flat_configurations() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3.0), (2.5, 2.5), (True, None), ("2.5", None), (None, None), (float("nan"), None), (float("-inf"), None)],
)
def test_only_a_finite_number_is_one(value: Any, expected: float | None) -> None:
    assert number(value) == expected


def test_the_last_point_of_a_step_counts_and_points_are_in_the_order_of_the_steps() -> None:
    rows = [{"step": 4, "loss": 2.0}, {"step": 2, "loss": 3.0}, {"step": 4, "loss": 1.0}, {"_step": 9, "loss": 0.0}]
    assert series(rows, "step") == {"loss": [(2, 3.0), (4, 1.0)]}


def test_as_values_for_json_a_number_that_is_none_becomes_null() -> None:
    started = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
    one = run("a", float("nan"), started=started, config={"limit": float("inf"), "seed": 7})
    told = json.loads(json.dumps(one.as_dict(), allow_nan=False))
    assert (told["summary"], told["config"]["limit"], told["config"]["seed"]) == ({"adapter.loss": None}, None, 7)
    assert (told["started"], told["steps"], told["samples"]) == ("2026-01-02T03:04:05+00:00", 8, 0)
    assert Run("b", "b", "b").as_dict()["steps"] is None
