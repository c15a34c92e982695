"""Sweeps: every combination runs apart from the others and from the user's files, and the best comes first."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.errors import StageError
from flows.paths import Paths
from flows.runtime.project import dvc, stage_order
from flows.scaling import sweep
from flows.scaling.ranking import ranked, rows, write_ranking
from flows.scaling.trial import SweepSettings, Trial, run_trial, snapshot

long = pytest.mark.skipif("PEFTCORE_LONG" not in os.environ, reason="set PEFTCORE_LONG=1 to run it")
MAKE = """\
import json, shutil
from pathlib import Path
from ruamel.yaml import YAML

train = YAML(typ="safe").load(Path("params.yaml"))["train"]
if train["batch_size"] == 3:
    raise SystemExit("error: three is refused")
shutil.copytree("source", "artifacts", dirs_exist_ok=True)
path = Path("artifacts/training/summary.json")
summary = json.loads(path.read_text())
summary["best_validation_loss"] = 2.0 + abs(train["learning_rate"] - 0.002) * 100 + 0.01 * train["batch_size"]
path.write_text(json.dumps(summary))
with open(SHARED, "a") as worked:
    print(train["learning_rate"], train["batch_size"], file=worked)
"""


@pytest.fixture
def swept(project: Any) -> Any:
    """The tiny repository, whose stage now gives a validation loss that depends on two parameters."""
    root = project.root
    (root / "make.py").write_text(MAKE.replace("SHARED", repr(str(root.parent / "worked"))))
    (root / "params.yaml").write_text(
        (root / "params.yaml").read_text() + "train: {learning_rate: 0.001, batch_size: 8, epochs: 1}\n"
    )
    text = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(
        text.replace(
            "deps: [source, make.py]", "deps: [source, make.py]\n    params: [train.learning_rate, train.batch_size]"
        )
    )
    project.git("commit", "--quiet", "--all", "--message=Parameters")
    return project


def worked(project: Any) -> list[str]:
    """The parameters with which the stage really ran, in the order in which it ended."""
    path = project.root.parent / "worked"
    return path.read_text().splitlines() if path.exists() else []


def run(project: Any, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "sweep", *arguments]
    return subprocess.run(
        command,
        cwd=project.root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


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


def test_the_best_comes_first_and_what_failed_last(tmp_path: Path) -> None:
    good = {"best_validation_loss": 2.5, "best_step": 4}
    bad = Trial(("a=1",), 1.0, error="the loss is nan | stopped\nmore")
    trials = ranked([bad, Trial(("a=2",), 2.0, good | {"best_validation_loss": 3.0}), Trial(("a=3",), 3.0, good)])
    assert [row[1:4] for row in rows(trials)] == [
        ("a=3", "2.5000", "4"),
        ("a=2", "3.0000", "4"),
        ("a=1", "", ""),
    ]
    folder = write_ranking(Paths(tmp_path), trials)
    assert [record["validation_loss"] for record in json.loads((folder / "sweep.json").read_text())] == [2.5, 3.0, None]
    assert (folder / "sweep.md").read_text().splitlines()[-1] == (
        r"|  | a=1 |  |  | 1.0 | the loss is nan \| stopped |"
    )


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(StageError, match=r"pip install 'peftcore\[scale\]'"):
        sweep._ray(1)


@pytest.mark.slow
def test_threads_map_the_grid_and_a_failed_trial_is_told(swept: Any) -> None:
    done = run(swept, "-S", "train.batch_size=4,3,2", "--jobs", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 3 trials failed" in done.stderr and "stage make failed" in done.stderr
    assert sorted(worked(swept)) == ["0.001 2", "0.001 4"]
    found = [record["validation_loss"] for record in json.loads((swept.root / "reports" / "sweep.json").read_text())]
    assert found == [pytest.approx(2.12), pytest.approx(2.14), None]
    (trials,) = json.loads(swept.paths.trials.read_text()).values()
    assert len(trials) == 2, "those that ran, for the versions to come on these data"


@pytest.mark.proof
@pytest.mark.parametrize("runner", ["ray", pytest.param("process", marks=long)])
def test_processes_and_ray_find_what_threads_find(swept: Any, runner: str) -> None:
    if runner == "ray":
        pytest.importorskip("prefect_ray", reason="needs `pip install 'peftcore[scale]'`")
    done = run(swept, "-S", "train.learning_rate=0.001,0.002", "--runner", runner, "--jobs", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(done.stdout[done.stdout.index("[\n") :])
    assert records[0]["parameters"] == ["train.learning_rate=0.002"]
    assert sorted(worked(swept)) == ["0.001 8", "0.002 8"]
