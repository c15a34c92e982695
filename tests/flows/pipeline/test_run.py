"""A run: what is checked before it, what it does if nothing has changed, and what it does without Prefect's server."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import GateError, RegistryError
from flows.pipeline import flow, run, work
from flows.runtime import prefect_server
from flows.runtime.last_run import last_run, running
from flows.runtime.stage_process import run_stage

HEAVY = ("torch", "transformers", "datasets", "wandb", "prefect", "httpx", "dvc", "networkx", "pandas")


def test_what_could_not_be_registered_is_refused_before_anything_runs(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.paths.params.write_text(project.paths.params.read_text().replace("docstrings", "summaries"))
    monkeypatch.chdir(project.root)
    done = CliRunner().invoke(app, ["run"])
    assert done.exit_code == 1
    assert "error: project.name is 'summaries', but `artifacts:` in dvc.yaml has no 'summaries'" in done.stderr
    assert done.stdout == ""


@pytest.mark.faults("Prefect down")
def test_what_could_not_be_registered_is_said_before_prefects_server_starts(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.paths.params.write_text(project.paths.params.read_text().replace("name: docstrings", "name: tickets"))
    monkeypatch.setattr(prefect_server, "tied_temporary_server", lambda: pytest.fail("it was started"))
    with pytest.raises(
        RegistryError, match=r"project\.name is 'tickets', but `artifacts:` in dvc\.yaml has no 'tickets'"
    ):
        run.run_pipeline(project.root)


def test_a_second_run_in_the_folder_is_told_of_the_first_one(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    code = (
        "from flows.pipeline import work; from flows.runtime.last_run import recorded; from flows.paths import Paths\n"
    )
    code += "from pathlib import Path; root = Path.cwd()\n"
    code += "with work.alone(root), recorded(Paths(root)) as record, record.at('train'): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline()
        done = CliRunner().invoke(app, ["run"])
        assert done.exit_code == 4
        assert f"error: a run (process {first.pid}, at train) is at work in {project.root}; wait for it" in done.stderr
        assert running(project.paths) is not None and last_run(project.paths) is None
        first.communicate(b"\n")
    with work.alone(project.root):
        pass


@pytest.mark.slow
def test_without_a_prefect_server_the_run_finishes(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    command = [sys.executable, "-m", "flows.cli", "run"]
    done = subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0
    assert "continuing without it" in done.stderr
    assert "Traceback" not in done.stderr
    assert project.git("tag", "--list").split() == ["docstrings#champion#1", "docstrings@v0.1.0"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_stages")
def test_a_prefect_server_that_goes_away_does_not_stop_the_run(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_way(root: Path, *_: object) -> NoReturn:
        run_stage(root, "make", 60)
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(flow, "pipeline", half_way)
    outcome = run.run_pipeline(project.root)
    assert outcome.promotion.outcome == "promoted"
    assert list(outcome.seconds) == ["make", "register", "promote", "review"]


def test_a_refusal_is_no_trouble_of_prefects(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise GateError("no")

    monkeypatch.setattr(flow, "pipeline", refuse)
    with pytest.raises(GateError):
        run.run_pipeline(project.root)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_stages")
def test_a_run_with_nothing_changed_starts_no_stage_and_no_server(
    project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work.run_stages(project.root, 60, None, lambda _, work: work)
    first = capsys.readouterr().out
    project.paths.review.unlink()
    monkeypatch.setattr(work, "run_stage", lambda *_: pytest.fail("a stage was started"))
    monkeypatch.setattr(prefect_server, "tied_temporary_server", lambda: pytest.fail("a server was started"))
    outcome = run.run_pipeline(project.root)
    told = capsys.readouterr()
    assert told.err == "no stage has changed\n"
    assert list(outcome.seconds) == ["check", "promote", "review"]
    assert outcome.promotion.outcome == "already" and "docstrings v0.1.0" in project.paths.review.read_text()
    table = first[: first.index("merged")]
    assert table and table in told.out


def test_the_check_imports_no_heavy_library(tmp_path: Path) -> None:
    code = f"import sys, flows.pipeline.run; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_state_that_cannot_be_read_is_left_to_the_stages(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Path] = []
    monkeypatch.setattr(run, "_by_prefect", lambda root, *_: ran.append(root))
    project.root.joinpath("dvc.lock").write_text("schema: '2.0'\nstages: {make: {cmd: 1}}\n")
    run.run_pipeline(project.root)
    assert ran == [project.root]
