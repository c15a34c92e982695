"""A run that was ended anywhere goes on as if it had not been: real processes, killed, told to end, without disk."""

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import CHECKPOINT, EVALUATION, STEP, Nursery, history_of, phase_of, wait_for_phase
from quiet_training import trained
from tiny_training import adapted, rows, trainer
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from peftcore import TrainingError

SIGKILLED = -signal.SIGKILL
RANDOM_KILLS = 5 * int(os.environ.get("PEFTCORE_FAULTS", "1"))
CASES = ["random", *(pytest.param(case, marks=pytest.mark.slow) for case in ("grouped", "packed", "float16"))]
Straight = Callable[[str], tuple[Path, float]]


@pytest.fixture(scope="module")
def straight(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """`straight("grouped")`: the case's run that nothing befell, and the seconds that it trained."""

    @cache
    def run(case: str) -> tuple[Path, float]:
        folder = tmp_path_factory.mktemp(case)
        nursery.start(folder, case)
        wait_for_phase(folder)
        began = time.monotonic()
        assert nursery.wait() == 0, error(folder)
        return folder, time.monotonic() - began

    return run


def error(folder: Path) -> str:
    path = folder / "error.txt"
    return path.read_text() if path.exists() else ""


def adapter(folder: Path) -> bytes:
    return (folder / "final" / "adapter_model.safetensors").read_bytes()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_equal_runs(folder: Path, straight: Path) -> None:
    assert history_of(folder)[:-1] == history_of(straight)[:-1]  # the last sums up the process, not the run
    assert adapter(folder) == adapter(straight)
    assert checkpoints(folder) == checkpoints(straight)


FAULTS = ["kill in evaluation", "kill in step", "torn file", "kill before the manifest", "kill before old ones go"]
"""In an order that leaves something to do."""


@pytest.mark.slow
@pytest.mark.faults("kill -9 of training", trials=len(FAULTS))
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_given_places_ends_bit_equal(
    nursery: Nursery, straight: Straight, tmp_path: Path, case: str
) -> None:
    hit: Counter[str] = Counter()
    for fault in FAULTS:
        status = nursery.run(tmp_path, case, resume=True, fault=fault, at=2)
        assert status == SIGKILLED, f"{fault}: {status} {error(tmp_path)}"
        hit[phase_of(tmp_path)] += 1
    assert hit == {STEP: 1, EVALUATION: 1, CHECKPOINT: 3}
    assert nursery.run(tmp_path, case, resume=True) == 0, error(tmp_path)
    assert_equal_runs(tmp_path, straight(case)[0])


@pytest.mark.slow
@pytest.mark.faults("kill -9 of training", trials=RANDOM_KILLS)
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_random_moments_ends_bit_equal(
    nursery: Nursery, straight: Straight, tmp_path: Path, case: str
) -> None:
    whole, seconds = straight(case)
    moments = random.Random(case)
    hit: Counter[str] = Counter()
    runs = [tmp_path / "0"]
    while hit.total() < RANDOM_KILLS:
        process = nursery.start(runs[-1], case, resume=True)
        wait_for_phase(runs[-1])
        time.sleep(moments.uniform(0, seconds / 2))
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process, signal.SIGKILL)
        status = nursery.wait()
        assert status in (0, SIGKILLED), error(runs[-1])
        if status == SIGKILLED:
            hit[phase_of(runs[-1])] += 1
        else:
            runs.append(tmp_path / str(len(runs)))
    print(f"{case}: {dict(hit)}")
    assert nursery.run(runs[-1], case, resume=True) == 0, error(runs[-1])
    for run in runs:
        assert_equal_runs(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "at", "step"),
    [
        ("term in step", 1, 1),  # before the first checkpoint was due
        ("term in step", 5, 3),  # in the first of two accumulated batches
        ("term in step", 7, 4),  # the epoch's last, with an evaluation due
        ("term in evaluation", 2, 2),
        ("term in checkpoint", 2, 4),
        ("term in step", 14, 8),  # the run's last, which an evaluation that is due then ends early
    ],
)
@pytest.mark.faults("SIGTERM")
def test_a_run_told_to_end_saves_its_step_and_goes_on_bit_equal(
    nursery: Nursery, straight: Straight, tmp_path: Path, fault: str, at: int, step: int
) -> None:
    assert nursery.run(tmp_path, "grouped", fault=fault, at=at, max_steps=12) == 128 + signal.SIGTERM, error(tmp_path)
    assert json.loads((tmp_path / "left.json").read_text())[1] == f"checkpoint-{step}"
    assert f"ended by SIGTERM after step {step} of 12" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "final").exists()
    assert nursery.run(tmp_path, "grouped", resume=True) == 0, error(tmp_path)
    whole = straight("grouped")[0]
    assert history_of(tmp_path)[:-1] == history_of(whole)[:-1]
    assert adapter(tmp_path) == adapter(whole)


@pytest.mark.slow
@pytest.mark.faults("disk full")
def test_a_full_disk_leaves_the_last_good_checkpoint_and_nothing_half_written(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run(tmp_path, "random", fault="full disk", at=2) == 1
    listing, good = json.loads((tmp_path / "left.json").read_text())
    assert good == "checkpoint-4"
    assert [name for name in listing if name.startswith("checkpoint")] == ["checkpoint-2", "checkpoint-4"]
    said = (tmp_path / "error.txt").read_text()
    assert said.startswith("TrainingError: checkpoint-6 could not be written to ")
    assert "free disk space, then resume: checkpoint-4 is intact" in said


# -- in one process --------------------------------------------------------------------------------------------------


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


class Send(TrainerCallback):
    """SIGTERM to this process in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_which_signals_end_a_run_can_be_chosen_and_handlers_are_put_back(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        handled = trainer(adapted(), tmp_path / "a", callbacks=[Send(2)])
        with pytest.raises(SystemExit) as ended:
            handled.train()
        assert ended.value.code == 143 and seen == []
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint-3"]  # though nothing was to be saved
        off = trainer(adapted(), tmp_path / "b", callbacks=[Send(2)])
        off.termination_signals = ()  # type: ignore[misc]
        off.train()
        assert seen == [signal.SIGTERM] and off.state.global_step == 8
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_evaluation_that_a_signal_prevented_is_made_up_for(tmp_path: Path, strategy: str) -> None:
    """Five steps an epoch; what is due at an epoch's end is due after eight steps as well, which are the run's last."""
    options = {**SAVING, "save_strategy": strategy, "eval_strategy": strategy, "eval_steps": 4, "save_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    straight = trainer(adapted(dropout=0.2), tmp_path / "straight", rows(20), **options)
    straight.train()
    for step in (4, 7):
        folder = tmp_path / str(step)
        with pytest.raises(SystemExit):
            trainer(adapted(dropout=0.2), folder, rows(20), callbacks=[Send(step)], **options).train()
        resumed = trainer(adapted(dropout=0.2), folder, rows(20), **options)
        resumed.train(resume_from_checkpoint=True)
        for key in ("loss", "eval_loss"):
            found, expected = ([r[key] for r in t.state.log_history if key in r] for t in (resumed, straight))
            assert found == expected and found
        assert resumed.state.best_global_step == straight.state.best_global_step
        for name, tensor in trained(straight.model).items():
            assert torch.equal(trained(resumed.model)[name], tensor)


def test_a_finished_run_that_is_resumed_takes_no_step_more(tmp_path: Path) -> None:
    """Eight steps end within the second epoch, where Trainer alone would take a ninth."""
    straight = trainer(adapted(), tmp_path, rows(20), **SAVING)
    straight.train()
    again = trainer(adapted(), tmp_path, rows(20), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    for name, tensor in trained(straight.model).items():
        assert torch.equal(trained(again.model)[name], tensor)
    longer = trainer(adapted(), tmp_path, rows(20), **SAVING, learning_rate=1e-3)
    longer.args.max_steps = 10
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 10


def test_the_train_loss_of_a_resumed_run_is_the_mean_of_its_own_steps(tmp_path: Path) -> None:
    """The losses before the checkpoint count in the next training record, and not in `train_loss`."""
    each_step = trainer(adapted(), tmp_path / "each", logging_steps=1)
    each_step.train()
    losses = [record["loss"] for record in each_step.state.log_history if "loss" in record]
    options = {"logging_steps": 100, "save_strategy": "steps", "save_steps": 4}
    trainer(adapted(), tmp_path / "rare", **options).train()
    resumed = trainer(adapted(), tmp_path / "rare", **options).train(str(tmp_path / "rare" / "checkpoint-4"))
    assert resumed.training_loss == pytest.approx(sum(losses[4:]) / 4, rel=1e-4)
    finished = trainer(adapted(), tmp_path / "rare", **options).train(str(tmp_path / "rare" / "checkpoint-8"))
    assert finished.training_loss == pytest.approx(0, abs=1e-2)


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_damaged_checkpoint_that_is_named_is_an_error(tmp_path: Path) -> None:
    trainer(adapted(), tmp_path, **SAVING, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(
        TrainingError, match=r"checkpoint-2 is damaged \(optimizer.pt\); .*=True takes the last complete"
    ):
        trainer(adapted(), tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_callbacks_of_one_class_each_get_their_own_state_back(tmp_path: Path) -> None:
    class Counts(TrainerCallback, ExportableState):
        def __init__(self, by: int = 1) -> None:
            self.by, self.count = by, 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.count += self.by

        def state(self) -> dict[str, Any]:
            return {"args": {"by": self.by}, "attributes": {"count": self.count}}

    with pytest.raises(SystemExit):
        trainer(adapted(), tmp_path, callbacks=[Counts(1), Counts(10), Send(4)], **SAVING).train()
    counts, new = [Counts(1), Counts(10)], EarlyStoppingCallback(5)
    resumed = trainer(adapted(), tmp_path, callbacks=[*counts, new], metric_for_best_model="loss", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert [one.count for one in counts] == [8, 80]
