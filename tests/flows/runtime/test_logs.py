"""The log: JSON lines or text on stderr, inherited by stages; quiet; results alone on stdout."""

import json
import logging
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.runtime import logs

STAGE = """\
import logging, sys
from flows.runtime import logs
from flows.runtime.progress import progress
logs.set_up()
logging.getLogger("flows.make").info("reading %d rows", 3)
logging.getLogger("flows.make").debug("row 1")
print("printed by the stage")
with progress(2, "rows", unit="row") as bar:
    bar.update(2)
import shutil
shutil.copytree("source", "artifacts", dirs_exist_ok=True)
"""


def peftcore(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def talkative(project: Any) -> Path:
    """The project with a stage that logs, prints and has a bar."""
    (project.root / "make.py").write_text(STAGE)
    return project.root


def records(stderr: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr.splitlines()]


def test_a_json_log_is_json_whole_with_the_stages_own_lines_in_it(talkative: Path) -> None:
    done = peftcore(talkative, "--log-format", "json", "stage", "make", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stage"] == "make"
    lines = records(done.stderr)
    (rows,) = [line for line in lines if line["message"] == "reading 3 rows"]
    assert (rows["level"], rows["logger"], rows["stage"]) == ("info", "flows.make", "make")
    assert datetime.fromisoformat(rows["time"]).utcoffset() == timedelta(0)
    messages = [line["message"] for line in lines]
    assert any("rows: 100%, 2 of 2 rows" in message for message in messages)
    assert "printed by the stage" in messages
    assert any("Running stage 'make'" in message for message in messages), "DVC's words are records too"
    assert "row 1" not in messages


def test_a_failure_is_a_record_with_its_status(project: Any) -> None:
    (project.root / "make.py").write_text("raise SystemExit('error: no data')")
    done = peftcore(project.root, "stage", "make", PEFTCORE_LOG_FORMAT="json")
    assert (done.returncode, done.stdout) == (1, "")
    lines = records(done.stderr)
    assert ("error", "error: no data", "make") in [(line["level"], line["message"], line["stage"]) for line in lines]
    assert lines[-1]["status"] == 1 and lines[-1]["message"].startswith("stage make failed")


def test_an_exception_is_one_record_with_its_traceback() -> None:
    code = "from flows.runtime import logs; logs.set_up(); import warnings; warnings.warn('odd'); 1 / 0"
    done = peftcore_code(code, PEFTCORE_LOG_FORMAT="json")
    warned, crashed = records(done.stderr)
    assert (warned["level"], warned["logger"]) == ("warning", "py.warnings")
    assert (crashed["level"], crashed["message"]) == ("critical", "ZeroDivisionError: division by zero")
    assert crashed["exception"].startswith("Traceback") and done.returncode == 1


@pytest.mark.slow
def test_quiet_leaves_results_warnings_and_errors(talkative: Path) -> None:
    done = peftcore(talkative, "stage", "make", "--quiet", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["stage"] == "make"
    (talkative / "make.py").write_text("raise SystemExit('error: no data')")
    failed = peftcore(talkative, "--quiet", "stage", "make")
    assert failed.stdout == "" and "error: no data" in failed.stderr and "Running" not in failed.stderr


def test_otherwise_stages_are_heard_on_stderr_and_verbose_tells_more(talkative: Path) -> None:
    done = peftcore(talkative, "stage", "make", "--verbose")
    assert done.stdout == ""
    for words in ("flows.make: reading 3 rows", "flows.make: row 1", "printed by the stage", "rows: 100%"):
        assert words in done.stderr, words


def peftcore_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("level", "quiet"), [("warning", True), ("debug", False), ("", False), ("loud", False)])
def test_the_level_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, level: str, quiet: bool) -> None:
    monkeypatch.setenv(logs.LEVEL, level)
    assert logs.is_quiet() is quiet


def test_a_line_that_only_looks_like_a_record_becomes_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.FORMAT, "json")
    own = json.dumps({"time": "t", "level": "info", "logger": "x", "stage": "make", "message": "m"}) + "\n"
    with caplog.at_level(logging.INFO):
        logs.relay([own, "{broken\n", '{"level": 3}\n', "[1, 2]\n", "\n", "ERROR: no\n"], "make")
    assert capsys.readouterr().err == own
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "{broken"),
        ("INFO", '{"level": 3}'),
        ("INFO", "[1, 2]"),
        ("ERROR", "ERROR: no"),
    ]
