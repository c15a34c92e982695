"""One trial of a sweep, apart from the user's files."""

import json
from typing import Any

import pytest
from sweep_cases import worked

from flows.runtime.project import dvc, stage_order
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
