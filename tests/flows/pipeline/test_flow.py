"""The flow: DVC's stages as tasks, the gate, the page and a summary, with a Prefect server of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HEAVY = ("torch", "transformers", "datasets", "wandb")


RUNS = """\
import json, os, sys
from flows.cli import app
told = []
for folder, *files in json.loads(sys.argv[1]):
    os.chdir(folder)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    try:
        app(["run"])
    except SystemExit as ended:
        told.append(ended.code)
    sys.stdout.flush()
    sys.stderr.flush()
with open(sys.argv[2], "w") as file:
    json.dump(told, file)
"""
"""`peftcore run` in one folder after the other; Prefect's server, which takes ten seconds to start, is the same one."""


class Run(NamedTuple):
    """What a run in a project came to."""

    project: Any
    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def runs(template: Path, project_at: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs of one process: a first one, a second one that has nothing to do, one that is refused, one that fails."""
    parent = tmp_path_factory.mktemp("runs")
    roots = {name: shutil.copytree(template, parent / name, symlinks=True) for name in ("good", "refused", "failing")}
    params = roots["refused"] / "params.yaml"
    params.write_text(params.read_text() + "gate: {min_loss_gain: 2.0}\n")
    (roots["failing"] / "make.py").write_text("raise SystemExit('error: no data')")
    folders = {
        "first": roots["good"],
        "second": roots["good"] / "source",
        "refused": roots["refused"],
        "failing": roots["failing"],
    }
    files = {name: [parent / f"{name}.{kind}" for kind in ("stdout", "stderr")] for name in folders}
    asked = json.dumps([[str(path) for path in (folder, *files[name])] for name, folder in folders.items()])
    command = [sys.executable, "-c", RUNS, asked, str(parent / "statuses")]
    patient = os.environ | {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600"}  # a busy machine is slow
    subprocess.run(command, env=patient, capture_output=True, check=True)
    statuses = json.loads((parent / "statuses").read_text())
    return {
        name: Run(project_at(roots.get(name, roots["good"])), status, *(file.read_text() for file in files[name]))
        for name, status in zip(folders, statuses, strict=True)
    }


def test_the_flow_imports_no_heavy_library(tmp_path: Path) -> None:
    code = f"import sys, flows.pipeline.flow, flows.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_it_runs_the_stages_promotes_and_reviews(runs: dict[str, Run]) -> None:
    project, status, stdout, stderr = runs["first"]
    assert status == 0, stderr
    for fact in (
        "docstrings v0.1.0 is champion",
        "3.800",
        "2.700",
        "perplexity",
        "ROUGE-L",
        "make ",
        str(project.root),
    ):
        assert fact in " ".join(stdout.split()).replace("- ", "-"), fact
    assert project.paths.review.exists()
    assert (project.root / ".prefect" / "prefect.db").exists()
    assert "Traceback" not in stderr and "continuing without it" not in stderr


@pytest.mark.slow
def test_a_second_run_changes_nothing(runs: dict[str, Run]) -> None:
    project, status, stdout, stderr = runs["second"]
    assert status == 0, stderr
    assert "no stage has changed" in stderr and "didn't change" not in stderr
    assert "is champion already" in stdout
    assert project.git("tag", "--list").split() == ["docstrings#champion#1", "docstrings@v0.1.0"]


@pytest.mark.slow
def test_a_refusal_comes_with_its_page_and_exit_status_3(runs: dict[str, Run]) -> None:
    project, status, _, stderr = runs["refused"]
    assert status == 3
    assert "error: docstrings v0.1.0 is not promoted to champion: gain in loss: 1.100 nats" in stderr
    assert "Traceback" not in stderr
    assert "is not promoted" in project.paths.review.read_text()
    assert json.loads(project.paths.promotion.read_text())["outcome"] == "refused"
    assert project.git("tag", "--list").split() == ["docstrings@v0.1.0"]


@pytest.mark.slow
def test_a_stage_that_fails_stops_the_run_with_its_own_message(runs: dict[str, Run]) -> None:
    project, status, _, stderr = runs["failing"]
    assert status == 1
    assert "error: no data" in stderr
    assert "error: stage make failed" in stderr
    assert "Traceback" not in stderr
    assert not project.paths.review.exists()
