"""One trial of a sweep, apart from the user's files."""

import json
from pathlib import Path
from typing import Any

import pytest
from sweep_cases import worked

from flows.runtime.project import dvc, stage_order
from flows.scaling import trial as module
from flows.scaling.trial import SweepSettings, run_trial, snapshot


@pytest.mark.slow
def test_a_trial_takes_files_as_they_are_and_leaves_them_so(swept: Any) -> None:
    params = swept.root / "params.yaml"
    params.write_text(params.read_text().replace("0.001", "0.002"))  # not committed
    before = swept.git("status", "--porcelain"), params.read_text(), swept.git("rev-parse", "HEAD")
    plan = SweepSettings(swept.root, snapshot(swept.root), 60.0)
    trial = run_trial(plan, ("train.batch_size=4",))
    assert trial.error is None and trial.loss == pytest.approx(2.04)
    assert worked(swept) == ["0.002 4"]
    assert (swept.git("status", "--porcelain"), params.read_text(), swept.git("rev-parse", "HEAD")) == before
    assert swept.git("worktree", "list").count("\n") == 1
    assert stage_order(swept.root, swept.paths.training) == ["make"]
    # what a trial made is in the cache: taking its parameters trains nothing
    params.write_text(params.read_text().replace("batch_size: 8", "batch_size: 4"))
    dvc(swept.root, "repro", "make")
    assert worked(swept) == ["0.002 4"]
    assert json.loads(swept.paths.training_summary.read_text())["best_validation_loss"] == pytest.approx(2.04)


def test_data_with_names_beyond_ascii_are_taken_from_dvc(swept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "größe \u2028.jsonl.dvc"
    (swept.root / name).write_text("outs: []\n")
    swept.git("add", name)
    checked_out: list[str] = []

    def dvc(_: Path, command: str, *names: str) -> None:
        assert command == "checkout"
        checked_out.extend(names)

    monkeypatch.setattr(module, "dvc", dvc)
    monkeypatch.setattr(module, "stage_order", lambda *_: [])
    swept.paths.training_summary.parent.mkdir(parents=True, exist_ok=True)
    swept.paths.training_summary.write_text("{}")
    module._trained(swept.root, SweepSettings(swept.root, "HEAD", 60.0), (), module._Watch(None))
    assert checked_out == [name]


LOGGING_STAGE = """\
import json, time
from pathlib import Path

log = Path("checkpoints/run/log.jsonl")
log.parent.mkdir(parents=True)
for step in range(1, 200):
    with log.open("a") as file:
        print(json.dumps({"step": step, "validation_loss": step / 10 if step % 2 == 0 else None}), file=file)
    time.sleep(0.1)
"""
"""A stage that would log validation losses for twenty seconds: 0.2 at step 2, 0.4 at step 4 and so on."""


@pytest.mark.slow
def test_a_report_gets_each_validation_loss_once_and_stops_the_training(swept: Any) -> None:
    (swept.root / "make.py").write_text(LOGGING_STAGE)
    swept.git("commit", "--quiet", "--all", "--message=Log")
    reported = []

    def report(evaluation: int, loss: float) -> str | None:
        reported.append((evaluation, loss))
        return "bad enough" if loss > 0.5 else None

    trial = run_trial(SweepSettings(swept.root, snapshot(swept.root), 60.0), ("train.batch_size=4",), report)
    assert (trial.pruned, trial.loss, trial.error) == ("bad enough", None, None)
    assert trial.params is not None and "batch_size: 4" in trial.params
    assert reported[:3] == [(1, 0.2), (2, 0.4), (3, 0.6)]
    assert [evaluation for evaluation, _ in reported] == list(range(1, len(reported) + 1)) and len(reported) < 99
    assert swept.git("worktree", "list").count("\n") == 1
