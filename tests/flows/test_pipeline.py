"""The flow: DVC's stages as tasks, the gate, the page and a summary, with a Prefect server of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from flows import pipeline
from flows.errors import GateError, RegistryError
from flows.runtime.stage_process import run_stage

HEAVY = ("torch", "transformers", "datasets", "wandb")


def run(project: Any, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "run", *arguments]
    return subprocess.run(command, cwd=cwd or project.root, capture_output=True, text=True, check=False, timeout=300)


def test_the_flow_imports_no_heavy_library(tmp_path: Path) -> None:
    code = f"import sys, flows.pipeline, flows.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_runs_the_stages_promotes_and_reviews_and_a_second_run_changes_nothing(project: Any) -> None:
    first = run(project)
    assert first.returncode == 0, first.stderr
    assert project.git("tag", "--list").split() == ["docstrings#champion#1", "docstrings@v0.1.0"]
    for fact in (
        "docstrings v0.1.0 is champion",
        "3.800",
        "2.700",
        "perplexity",
        "ROUGE-L",
        "make ",
        str(project.root),
    ):
        assert fact in " ".join(first.stdout.split()).replace("- ", "-"), fact
    assert project.paths.review.exists()
    assert (project.root / ".prefect" / "prefect.db").exists()
    assert "Traceback" not in first.stderr

    lock = (project.root / "dvc.lock").read_bytes()
    second = run(project, cwd=project.root / "source")
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("didn't change, skipping") == 2
    assert "is champion already" in second.stdout
    assert (project.root / "dvc.lock").read_bytes() == lock
    assert len(project.git("tag", "--list").split()) == 2


def test_a_refusal_comes_with_its_page_and_exit_status_3(project: Any) -> None:
    project.paths.params.write_text(project.paths.params.read_text() + "gate: {min_loss_gain: 2.0}\n")
    done = run(project)
    assert done.returncode == 3
    assert "error: docstrings v0.1.0 is not promoted to champion: gain in loss: 1.100 nats" in done.stderr
    assert "Traceback" not in done.stderr
    assert "is not promoted" in project.paths.review.read_text()
    assert json.loads(project.paths.promotion.read_text())["outcome"] == "refused"
    assert project.git("tag", "--list").split() == ["docstrings@v0.1.0"]


def test_a_stage_that_fails_stops_the_run_with_its_own_message(project: Any) -> None:
    (project.root / "make.py").write_text("raise SystemExit('error: no data')")
    done = run(project)
    assert done.returncode == 1
    assert "error: no data" in done.stderr
    assert "error: stage make failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not project.paths.review.exists()


def test_what_could_not_be_registered_is_refused_before_anything_runs(project: Any) -> None:
    project.paths.params.write_text(project.paths.params.read_text().replace("docstrings", "summaries"))
    done = run(project)
    assert done.returncode == 1
    assert "error: project.name is 'summaries', but `artifacts:` in dvc.yaml has no 'summaries'" in done.stderr
    assert done.stdout == ""


@pytest.mark.faults("Prefect down")
def test_what_could_not_be_registered_is_said_before_prefects_server_starts(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.paths.params.write_text(project.paths.params.read_text().replace("name: docstrings", "name: tickets"))
    monkeypatch.setattr(pipeline, "tie_temporary_server", lambda: pytest.fail("it was started"))
    with pytest.raises(
        RegistryError, match=r"project\.name is 'tickets', but `artifacts:` in dvc\.yaml has no 'tickets'"
    ):
        pipeline.run_pipeline(project.root)


def test_without_a_prefect_server_the_run_finishes(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    done = run(project)
    assert done.returncode == 0
    assert "continuing without it" in done.stderr
    assert "Traceback" not in done.stderr
    assert project.git("tag", "--list").split() == ["docstrings#champion#1", "docstrings@v0.1.0"]


def test_a_prefect_server_that_goes_away_does_not_stop_the_run(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_way(root: Path, *_: object) -> NoReturn:
        run_stage(root, "make", 60)
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(pipeline, "pipeline", half_way)
    outcome = pipeline.run_pipeline(project.root)
    assert outcome.promotion.outcome == "promoted"
    assert list(outcome.seconds) == ["make", "register", "promote", "review"]


def test_a_refusal_is_no_trouble_of_prefects(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise GateError("no")

    monkeypatch.setattr(pipeline, "pipeline", refuse)
    with pytest.raises(GateError):
        pipeline.run_pipeline(project.root)
