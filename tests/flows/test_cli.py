"""The command line as a whole: help and options of each command, exit codes, and one message for what is refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import peftcore
from typer.main import get_command

from flows.cli import app

WITHOUT_JSON = {
    "chat": "a conversation in the terminal",
    "serve": "a server: it answers over HTTP, and tells how it is by /metrics",
    "schedule": "stays until it is stopped; `status --json` tells when it retrains next",
    "registry card": "its result is a Markdown file",
}
"""{command: why it needs no --json}"""


def commands(group: Any = None, before: str = "") -> Iterator[str]:
    """Every command that there is, groups left out."""
    for name, command in (group or get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name


@pytest.mark.parametrize("command", list(commands()))
def test_each_command_says_what_it_does_and_speaks_json(command: str) -> None:
    result = peftcore(*command.split(), "--help")
    assert result.exit_code == 0
    assert len(result.stdout) > 300
    assert ("--json" in result.stdout) is (command not in WITHOUT_JSON), "scripts want JSON; or say in WITHOUT_JSON why"
    for option in ("--quiet", "--verbose", "--log-format"):
        assert option in result.stdout


@pytest.mark.parametrize(("installed", "printed"), [("0.2.0", "0.2.0"), (None, "source")])
def test_the_version_is_printed(installed: str | None, printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.cli.installed_version", lambda: installed)
    result = peftcore("--version")
    assert (result.exit_code, result.stdout) == (0, f"{printed}\n")


def test_every_exemption_is_a_command() -> None:
    assert set(commands()) >= set(WITHOUT_JSON)


def test_the_help_tells_the_exit_statuses() -> None:
    text = " ".join(peftcore("--help").stdout.split())
    for words in (
        "0 success",
        "1 failed or refused, with one message on stderr that begins with error:",
        "2 usage error",
        "3 the gate",
        "4 conflict or busy",
        "130",
        "143",
    ):
        assert words in text


def test_outside_a_pipeline_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("run", "status", "promote", "review", "doctor"):
        result = peftcore(command)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: no pipeline in {tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage", "trian"], "error: there is no stage 'trian' in dvc.yaml; there is: make, register"),
        (["registry", "show", "v9.9.9"], "error: docstrings has no version v9.9.9; there is: v0.1.0"),
        (["promote", "--version", "v9.9.9"], "error: docstrings has no version v9.9.9"),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(
    registered: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(registered.root / "source")
    result = peftcore(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(message)


def test_a_bad_parameter_is_one_message(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    project.paths.params.write_text("project: {nmae: x}\n")
    result = peftcore("status")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: params.yaml:1:")


# -- the command line as a process ------------------------------------------------------------------------------------


def start(project: Any, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=project.root,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # what was started in the background passes over Ctrl-C, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_is_stopped_says_so_by_the_exit_status(project: Any, number: int, status: int) -> None:
    (project.root / "make.py").write_text("open('began', 'w').close(); import time; time.sleep(100)")
    process = start(project, "stage", "make")
    while not (project.root / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == status, stderr


def test_a_command_line_that_cannot_be_read_exits_with_2(project: Any) -> None:
    for arguments in (["stage"], ["run", "--nothing"]):
        result = peftcore(*arguments)
        assert (result.exit_code, result.stdout) == (2, "") and "Error" in result.stderr
    process = start(project, "promote", "--quiet", "--verbose")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "") and "Error" in stderr
