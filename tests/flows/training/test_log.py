import json
from pathlib import Path

import pytest

from flows.training.log import FIELDS, TrainingLog, loss_table


@pytest.fixture
def log(tmp_path: Path) -> TrainingLog:
    log = TrainingLog(tmp_path / "run" / "log.jsonl")
    for step in (1, 2, 3):
        log.append(step=step, loss=3.0 - step / 10, learning_rate=0.1 * step, seconds=float(step))
        if step != 1:
            log.append(step=step, validation_loss=4.0 - step, seconds=step + 0.5)
    return log


def test_each_record_is_a_line_with_every_field(log: TrainingLog) -> None:
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert len(lines) == 5 and all(tuple(line) == FIELDS for line in lines)
    assert lines[0] == dict.fromkeys(FIELDS) | {"step": 1, "loss": 2.9, "learning_rate": 0.1, "seconds": 1.0}


def test_a_line_that_a_crash_cut_short_is_left_out(log: TrainingLog) -> None:
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in log.records()] == [1, 2, 2, 3, 3]
    assert [record["step"] for record in log.keep_until(3)] == [1, 2, 2, 3, 3]
    log.append(step=4)
    assert log.records()[-1]["step"] == 4


def test_going_on_from_a_step_drops_what_came_after_it(log: TrainingLog) -> None:
    kept = log.keep_until(2)
    assert kept == log.records() and [record["step"] for record in kept] == [1, 2, 2]
    assert log.keep_until(0) == [] == log.records()


def test_a_log_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert TrainingLog(tmp_path / "log.jsonl").records() == []


def test_the_curves_have_a_line_for_each_step(log: TrainingLog) -> None:
    assert loss_table(log.records()).splitlines() == [
        "step,train_loss,validation_loss,learning_rate",
        "1,2.9,,0.1",
        "2,2.8,2.0,0.2",
        "3,2.7,1.0,0.30000000000000004",
    ]


def test_what_is_not_finite_is_null(log: TrainingLog) -> None:
    record = log.append(step=4, loss=float("nan"), grad_norm=float("inf"), rollbacks=1)
    assert (record["loss"], record["grad_norm"], record["rollbacks"]) == (None, None, 1)
    assert log.records()[-1] == record


def test_ranks_are_written_when_they_change(log: TrainingLog) -> None:
    assert log.rank_history() == [] and not log.append_ranks(0, {})
    written = [log.append_ranks(step, {"a": rank, "b": 4}) for step, rank in ((0, 4), (1, 4), (2, 3), (3, 2))]
    assert written == [True, False, True, True]
    log.keep_until(2)
    assert log.rank_history() == [{"step": 0, "ranks": {"a": 4, "b": 4}}, {"step": 2, "ranks": {"a": 3, "b": 4}}]
    assert log.append_ranks(3, {"a": 4, "b": 4})
