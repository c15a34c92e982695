"""The command line: what each command prints, from any sub-folder, and one message and exit 1 for what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import Result
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli import app


def peftcore(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.fixture
def registered(registered: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(registered.root / "source")
    return registered


WITHOUT_JSON = {
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


def test_every_exemption_is_a_command() -> None:
    assert set(commands()) >= set(WITHOUT_JSON)


def test_the_help_tells_the_exit_statuses() -> None:
    text = " ".join(peftcore("--help").stdout.split())
    for words in (
        "0 success",
        "1 failed or refused",
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


def test_promote_and_what_the_registry_then_shows(registered: Any) -> None:
    dry = peftcore("promote", "--dry-run")
    assert (dry.exit_code, "would become champion" in dry.stdout) == (0, True)
    assert json.loads(peftcore("registry", "list", "--json").stdout)[0]["stages"] == []
    done = peftcore("promote")
    assert done.exit_code == 0
    assert "docstrings v0.1.0 is champion" in done.stdout
    assert "merge fidelity" in done.stdout
    (row,) = json.loads(peftcore("registry", "list", "--json").stdout)
    assert (row["version"], row["stages"], row["summary"]) == ("v0.1.0", ["champion"], "test loss 3.800 -> 2.700")
    assert "champion" in peftcore("registry", "list").stdout
    assert json.loads(peftcore("registry", "show", "--json").stdout)["version"] == "v0.1.0"
    assert json.loads(peftcore("registry", "show", "champion", "--json").stdout)["evaluation_set"] == "e" * 64


def test_the_gate_as_markdown_and_what_differs(registered: Any, tmp_path: Path) -> None:
    peftcore("promote")
    registered.register(loss=2.6, weight=2.0)
    page = tmp_path / "summary" / "gate.md"
    assert peftcore("promote", "--dry-run", "--markdown", str(page)).exit_code == 0
    assert page.read_text().startswith("## ✅ docstrings v0.1.1 would become champion")
    assert "| against the champion | ✅ | loss -0.1000 nats against v0.1.0" in page.read_text()
    told = json.loads(peftcore("registry", "diff", "champion", "--json").stdout)
    assert (told["before"], told["after"]) == ("v0.1.0", "v0.1.1")
    (loss,) = [one for one in told["differences"] if (one["part"], one["key"]) == ("metrics", "adapter.loss")]
    assert (loss["before"], loss["after"], round(loss["change"], 6)) == (2.7, 2.6, -0.1)
    text = peftcore("registry", "diff", "v0.1.0", "v0.1.1").stdout
    assert "adapter.loss" in text and "-0.1" in text
    assert "do not differ" in peftcore("registry", "diff", "v0.1.0", "v0.1.0").stdout
    assert "no version v9.0.0" in peftcore("registry", "diff", "v9.0.0").stderr


def test_rolling_back(registered: Any) -> None:
    peftcore("promote")
    assert peftcore("rollback", "--reason", "why").exit_code == 1
    registered.register(loss=2.6, weight=2.0)
    peftcore("promote")
    back = peftcore("rollback", "--reason", "answers in capitals", "--json")
    assert (back.exit_code, json.loads(back.stdout)["outcome"]) == (0, "rolled back")
    assert "champion is v0.1.0" in peftcore("status").stdout


def test_a_refusal_exits_with_3_and_its_reason_and_json_stays_json(registered: Any) -> None:
    registered.paths.params.write_text(registered.paths.params.read_text() + "gate: {min_loss_gain: 2.0}\n")
    result = peftcore("promote", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["report"]["reason"] == "gain in loss: 1.100 nats, at least 2"
    assert result.stderr == (
        "error: docstrings v0.1.0 is not promoted to champion: gain in loss: 1.100 nats, at least 2\n"
    )


def test_status_tells_stages_and_champion(registered: Any) -> None:
    peftcore("promote")
    source = registered.root / "source" / "merge.json"
    source.write_text(source.read_text() + " ")
    status = json.loads(peftcore("status", "--json").stdout)
    assert status["stages"] == {"make": ["modified source"], "register": ["has not run yet"]}
    assert status["registry"] == {"champion": "v0.1.0"}
    assert status["champion"]["version"] == status["candidate"]["version"] == "v0.1.0"
    text = peftcore("status").stdout
    assert "modified source" in text
    assert "v0.1.0, promoted" in text
    assert "docstrings: champion is v0.1.0" in text


def test_review_says_where_the_page_is(registered: Any) -> None:
    result = peftcore("review")
    assert result.exit_code == 0
    assert Path(result.stdout.strip()) == registered.paths.review


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage", "trian"], "error: there is no stage 'trian' in dvc.yaml; there is: make, register"),
        (["registry", "show", "v9.9.9"], "error: docstrings has no version v9.9.9; there is: v0.1.0"),
        (["promote", "--version", "v9.9.9"], "error: docstrings has no version v9.9.9"),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(registered: Any, arguments: list[str], message: str) -> None:
    result = peftcore(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(message)


def test_a_bad_parameter_is_one_message(registered: Any) -> None:
    registered.paths.params.write_text("project: {nmae: x}\n")
    result = peftcore("status")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: params.yaml:1:")


def test_an_empty_registry_says_so(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    assert "no version of docstrings yet" in peftcore("registry", "list").stdout
    assert "nothing is promoted yet" in peftcore("status").stdout
    assert peftcore("registry", "show").exit_code == 1


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


def test_a_run_told_as_json_is_one_document_whatever_came_of_it(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_server(*_: object) -> NoReturn:
        raise RuntimeError("Failed to reach API")

    monkeypatch.setattr("flows.pipeline.pipeline", no_server)
    monkeypatch.chdir(project.root)
    params = project.paths.params.read_text()
    project.paths.params.write_text(params + "gate: {min_loss_gain: 2.0}\n")
    result = peftcore("run", "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["outcome"], told["status"]) == (3, "refused", 3), result.stderr
    assert told["error"] in result.stderr and told["promotion"]["report"]["passed"] is False
    assert Path(told["page"]) == project.paths.review
    project.paths.params.write_text(params)
    result = peftcore("run", "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["outcome"], told["version"], told["error"]) == (0, "promoted", "v0.1.0", None)
    assert list(told["seconds"]) == ["make", "register", "promote", "review"]
