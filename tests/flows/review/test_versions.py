"""Versions, stages and DVC experiments as runs, and which W&B run is the champion."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.errors import RegistryError
from flows.gate.promote import promote
from flows.review.run import Run
from flows.review.sources import read_runs
from flows.review.versions import Versions
from flows.runtime.project import dvc
from flows.scaling.experiment import EXPERIMENTS, run_experiment


def test_versions_and_stages(registered: Any, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"champion is no folder, no version, and no stage.*; stages: none\."):
        read_runs(["champion"], registered.root)
    promote(registered.params, registered.paths)
    registered.register(loss=2.6, weight=2.0)
    champion, other = read_runs(["champion", "v0.1.1", "v0.1.0"], registered.root)
    assert (champion.name, champion.version, champion.is_champion) == ("v0.1.0", "v0.1.0", True)
    assert (other.name, other.is_champion, other.summary["adapter.loss"]) == ("v0.1.1", False, 2.6)
    assert champion.state == "registered" and champion.config["train.learning_rate"] == 5e-4
    assert champion.history["validation_loss"] == [(2, 3.0), (4, 2.7)]
    assert champion.history["loss"][0] == (1, 3.5)
    assert champion.samples[0]["adapter"] == "Say hello." and not champion.warnings
    with pytest.raises(RegistryError, match=r"no version v9\.0\.0; there is: v0\.1\.0, v0\.1\.1"):
        read_runs(["v9.0.0"], registered.root)

    by_tag = Run("a", "a", "a", version="v0.1.0", summary={"registry.tag": "docstrings@v0.1.0"})
    elsewhere = replace(by_tag, id="b", summary={"registry.tag": "another@v0.1.0"})
    unknown = Run("c", "c", "c")
    marked = Versions(registered.root, registered.params).marked([by_tag, elsewhere, unknown])
    assert [run.is_champion for run in marked] == [True, False, False]
    assert marked[2].version is None, "versions without a W&B run have no id to be known by"

    for store in (registered.root / ".dvc" / "cache", registered.root / ".dvc-remote"):
        store.rename(tmp_path / store.name)
    (run,) = read_runs(["v0.1.0"], registered.root)
    assert run.history == {} and run.samples == () and run.summary["adapter.loss"] == 2.7
    assert any("neither in DVC's cache nor in its remote" in warning for warning in run.warnings)


@pytest.mark.proof
def test_a_sweep_by_dvcs_queue_and_a_trial_are_experiments_to_compare(project: Any) -> None:
    project.paths.params.write_text(project.paths.params.read_text() + "train: {learning_rate: 0.1}\n")
    project.git("commit", "--quiet", "--all", "--message=Train")
    dvc(project.root, "exp", "run", "--queue", "-S", "train.learning_rate=2e-4,5e-4,1e-3")
    dvc(project.root, "exp", "run", "--run-all", "--jobs", "1")
    trial = run_experiment(project.root, ["train.learning_rate=3e-3"], "mine")
    runs = read_runs(["exp:"], project.root)
    assert sorted(run.config["train.learning_rate"] for run in runs) == [2e-4, 5e-4, 1e-3, 3e-3]
    assert all(run.summary["adapter.loss"] == 2.7 and run.history["loss"] and run.samples for run in runs)
    shown = dvc(project.root, "exp", "show", "--json", "--no-pager")
    assert all(run.name in shown for run in runs)
    (mine,) = read_runs(["exp:mine"], project.root)
    assert (trial, mine.config["train.learning_rate"]) == ("mine", 3e-3)
    assert project.git("tag", "--list") == "", "nothing is registered"
    assert project.git("status", "--porcelain", "--untracked-files=no") == "", "the working tree is as it was"
    assert len(project.git("for-each-ref", EXPERIMENTS).splitlines()) == 4
