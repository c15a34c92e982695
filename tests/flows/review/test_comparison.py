"""Runs beside each other: order, differences, best figures, and answers by their prompt."""

import json
from typing import Any

import pytest
from compared_runs import run

from flows.review.comparison import Comparison, compare
from flows.review.run import Run


def test_the_best_comes_first_and_a_run_without_figures_last(comparison: Comparison) -> None:
    assert [run.name for run in comparison.runs] == ["better", "worse", "unknown"]
    assert comparison.judged_by is not None and comparison.judged_by.label == "test loss"
    loss = comparison.figures[0]
    assert loss.values == (2.5, 2.9, None) and loss.best == {0} and loss.shown(2) == "–"


def test_without_test_losses_the_validation_loss_decides() -> None:
    found = compare([run("a", None), Run("b", "b", "b", summary={"best_validation_loss": 1.5})])
    assert [one.name for one in found.runs] == ["b", "a"]
    assert found.judged_by is not None and found.judged_by.label == "validation loss"


def test_what_differs_and_what_does_not(comparison: Comparison) -> None:
    assert comparison.differing == {"method.r": (8, 4, 8)}
    assert comparison.shared == {"train.learning_rate": 1e-3, "method.name": "lora"}


@pytest.mark.parametrize(
    ("one", "other", "differ"), [(1, 1.0, False), (1, True, True), (None, 0, True), ([1], [1], False)]
)
def test_equal_values(one: Any, other: Any, differ: bool) -> None:
    found = compare([run("a", 1.0, config={"x": one}), run("b", 2.0, config={"x": other})])
    assert ("x" in found.differing) == differ


def test_figures_that_are_all_alike_have_no_best() -> None:
    assert compare([run("a", 2.0), run("b", 2.0)]).figures[0].best == frozenset()


def test_answers_are_put_together_by_their_prompt(comparison: Comparison) -> None:
    (first, answers), (second, others) = comparison.prompts()
    assert (first["prompt"], answers) == ("p", ("good", "bad", None))
    assert (second["prompt"], others) == ("q", ("good", None, None))


def test_as_json_it_is_json(comparison: Comparison) -> None:
    told = json.loads(json.dumps(compare([*comparison.runs, run("nan", float("nan"))]).as_dict(), allow_nan=False))
    assert [one["name"] for one in told["runs"]] == ["better", "worse", "nan", "unknown"]
    assert told["runs"][0]["champion"] and told["runs"][0]["headlines"]["test loss"] == 2.5
    assert (told["judged_by"], told["differing"]) == ("test loss", ["method.r"])


def test_a_scorer_is_a_figure_without_a_better_direction() -> None:
    scored = [
        Run(name, name, name, summary={"adapter.loss": 2.0, "adapter.refund": value, "scorers.refund.answers": 8})
        for name, value in (("a", 0.5), ("b", 0.75))
    ]
    found = {figure.headline.label: figure for figure in compare([*scored, run("c", 3.0)]).figures}
    assert found["refund"].values == (0.5, 0.75, None) and found["refund"].best == frozenset()
