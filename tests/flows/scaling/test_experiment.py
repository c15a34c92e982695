"""A trial: one run with other parameters as a DVC experiment."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import StageError
from flows.scaling import experiment
from flows.scaling.experiment import EXPERIMENTS, run_experiment


@pytest.mark.slow
def test_a_trial_as_a_command_tells_what_it_came_to(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project.paths.params.write_text(project.paths.params.read_text() + "train: {learning_rate: 0.1}\n")
    project.git("commit", "--quiet", "--all", "--message=Train")
    monkeypatch.chdir(project.root)
    told = CliRunner().invoke(app, ["trial", "train.learning_rate=3e-3", "--name", "mine", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["metrics"]["adapter.loss"] == 2.7
    told = CliRunner().invoke(app, ["trial", "train.learning_rate=4e-3", "--name", "other"])
    assert "2.700" in told.stdout and "`dvc exp apply other`" in told.stdout


@pytest.mark.slow
def test_a_trial_of_a_sweeps_agent_has_its_runs_name_and_counts_once(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    before = project.git("status", "--porcelain"), project.git("rev-parse", "HEAD")
    assert run_experiment(project.root, ["train.learning_rate=3e-3"]) == "trial-abc123"
    assert project.git("for-each-ref", "--format=%(refname:lstrip=-1)", EXPERIMENTS).split() == ["trial-abc123"]
    assert "learning_rate: 0.003" in project.git("show", f"{experiment_of(project)}:params.yaml")
    assert (project.git("status", "--porcelain"), project.git("rev-parse", "HEAD")) == before
    assert project.git("tag", "--list") == "", "nothing is registered"
    (counted,) = json.loads(project.paths.trials.read_text()).values()
    assert len(counted) == 1


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_trial_that_ends_meanwhile_is_not_taken_for_this_one(
    project: Any, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    project.make()
    project.git("add", "--force", "dvc.lock")
    own, other = (project.git("commit-tree", project.git("write-tree").strip(), "-m", words).strip() for words in "ab")
    head = project.git("rev-parse", "HEAD").strip()
    noted = []

    def dvc(command: list[str], **_: Any) -> Any:
        given = command[command.index("--name") + 1]
        for commit, of in ((own, given), (other, "zz-other"), (other, "aa-other")):
            project.git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{of}", commit)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(experiment, "subprocess", SimpleNamespace(run=dvc))
    monkeypatch.setattr(experiment, "note_trial", lambda _, lock, params: noted.append((lock, params)))
    chosen = run_experiment(project.root, [], name)
    assert project.git("rev-parse", f"refs/exps/{head[:2]}/{head[2:]}/{chosen}").strip() == own
    assert chosen == name or (name is None and chosen.startswith("trial-"))
    assert len(noted) == 1
    with pytest.raises(StageError, match=rf"experiment {chosen} of this commit exists already; .*dvc exp remove"):
        run_experiment(project.root, [], chosen)
    assert len(noted) == 1, "nothing ran"


@pytest.mark.slow
def test_a_trial_that_fails_is_one_error_and_counts_for_nothing(
    project: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    (project.root / "make.py").write_text("raise SystemExit('error: no luck')\n")
    project.git("commit", "--quiet", "--all", "--message=Fail")
    with pytest.raises(StageError, match=r"the trial with train\.learning_rate=3e-3 failed, see its error above"):
        run_experiment(project.root, ["train.learning_rate=3e-3"], "mine")
    assert "error: no luck" in "".join(capfd.readouterr())
    assert project.git("for-each-ref", EXPERIMENTS) == "" and not project.paths.trials.exists()


def experiment_of(project: Any) -> str:
    """The commit of the only experiment."""
    (commit,) = project.git("for-each-ref", "--format=%(objectname)", EXPERIMENTS).split()
    return commit
