from types import SimpleNamespace
from typing import Any

import pytest

from flows.training_callbacks import EvaluateAt, StopWithoutGain, evaluations_since_best, evenly_spread


def history(*losses: float) -> list[dict[str, Any]]:
    return [record for loss in losses for record in ({"loss": 1.0}, {"eval_loss": loss})]


@pytest.mark.parametrize(
    ("total", "count", "steps"),
    [(100, 5, [20, 40, 60, 80, 100]), (101, 4, [25, 50, 76, 101]), (3, 5, [1, 2, 3]), (1, 1, [1]), (7, 1, [7])],
)
def test_evaluations_are_spread_evenly_and_the_last_step_is_one(total: int, count: int, steps: list[int]) -> None:
    assert evenly_spread(total, count) == steps


def test_evaluations_since_the_best_are_counted() -> None:
    assert evaluations_since_best([]) == evaluations_since_best(history(3.0)) == 0
    assert evaluations_since_best(history(3.0, 2.0, 2.5, 2.1)) == 2
    assert evaluations_since_best(history(2.0, 2.0)) == 1  # as good is not better


@pytest.mark.parametrize(("losses", "stops"), [((3.0, 2.0, 2.5), False), ((3.0, 2.0, 2.5, 2.2), True)])
def test_patience_is_a_number_of_evaluations_in_a_row(losses: tuple[float, ...], stops: bool) -> None:
    control = SimpleNamespace(should_training_stop=False)
    StopWithoutGain(patience=2).on_evaluate(None, SimpleNamespace(log_history=history(*losses)), control)
    assert control.should_training_stop == stops


def test_a_step_that_is_evaluated_is_saved_as_well() -> None:
    for step, asked in ((4, True), (5, False)):
        control = SimpleNamespace(should_evaluate=False, should_save=False)
        EvaluateAt([4, 8]).on_step_end(None, SimpleNamespace(global_step=step), control)
        assert control.should_evaluate == control.should_save == asked
