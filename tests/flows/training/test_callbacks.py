import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flows.training.callbacks import (
    EvaluateAt,
    ShowProgress,
    StopWithoutGain,
    WriteLog,
    evaluations_since_best,
    evenly_spread,
)
from flows.training.log import TrainingLog
from peftcore import LoraConfig, get_peft_model


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


ARGS = SimpleNamespace(device=torch.device("cpu"), eval_batch_size=4)


def test_a_record_says_what_went_wrong_and_what_was_held(tmp_path: Path) -> None:
    mirrored: list[dict[str, Any]] = []
    write = WriteLog(TrainingLog(tmp_path / "log.jsonl"), mirrored.append, seconds=0.0)
    state = SimpleNamespace(global_step=1, epoch=0.5, num_input_tokens_seen=0)
    write.on_step_begin(ARGS, state, None)
    state.num_input_tokens_seen = 100
    write.on_step_end(ARGS, state, None)
    write.on_log(ARGS, state, None, {"loss": 2.0, "learning_rate": 0.1, "loss_scale": 512.0, "skipped_steps": 2})
    (record,) = write.log.records()
    assert record == mirrored[0]
    assert (record["loss_scale"], record["skipped_steps"], record["rollbacks"], record["micro_batch_splits"]) == (
        *(512.0, 2, 0, 0),
    )
    assert record["tokens_per_second"] > 0 and record["peak_memory"] > 2**20  # bytes


def test_ranks_are_recorded_at_the_start_and_when_they_change(tmp_path: Path) -> None:
    mirrored: list[dict[str, Any]] = []
    write = WriteLog(TrainingLog(tmp_path / "log.jsonl"), mirrored.append, seconds=0.0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(r=4, target_modules=["0", "1"]))
    state = SimpleNamespace(global_step=0, epoch=0.0, num_input_tokens_seen=0)
    write.on_train_begin(ARGS, state, None, model=model)
    write.on_log(ARGS, state, None, {}, model=model)
    assert write.log.rank_history() == [{"step": 0, "ranks": {"0": 4, "1": 4}}]
    assert mirrored == [{"step": 0, "mean_rank": 4.0}]


def test_the_bar_shows_speed_memory_losses_and_an_evaluation_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    show, state = ShowProgress(), SimpleNamespace(max_steps=2, global_step=0, num_input_tokens_seen=0)
    show.on_train_begin(ARGS, state, None)
    state.num_input_tokens_seen = 500
    show.on_step_end(ARGS, state, None)
    show.on_log(ARGS, state, None, {"loss": 2.5})
    for _ in range(3):  # nine rows in batches of four
        show.on_prediction_step(ARGS, state, None, eval_dataloader=SimpleNamespace(dataset=range(9)))
    show.on_log(ARGS, state, None, {"eval_loss": 2.25})
    show.on_evaluate(ARGS, state, None)
    show.on_step_end(ARGS, state, None)
    show.on_train_end(ARGS, state, None)
    lines = pipe.getvalue().splitlines()
    assert [line for line in lines if line.startswith("train > validation: 100%, 9 of 9 rows")]
    assert lines[-1].startswith("train: 100%, 2 of 2 steps")
    for shown in ("loss=2.500", "validation=2.250", "tokens/s=", "peak=", "GiB"):
        assert shown in lines[-1]
