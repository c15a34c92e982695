"""retrain from the command line: trusted files, and the earlier name of the option."""

import json
import shutil
import subprocess
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.retraining.trust import exclude, read_excluded, read_trusted


@pytest.mark.parametrize(("option", "warns"), [("--trust", False), ("--release", True)])
def test_a_file_is_trusted_by_name_and_the_earlier_option_says_its_new_name(
    project: Any, monkeypatch: pytest.MonkeyPatch, option: str, warns: bool
) -> None:
    monkeypatch.chdir(project.root)
    project.paths.retraining.mkdir(parents=True)
    exclude(project.paths, {"week2.jsonl": "a" * 64}, "by hand")
    done = CliRunner().invoke(app, ["retrain", option, "week2.jsonl", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["trusted"] == ["a" * 64]
    assert ("use --trust" in done.stderr) == warns
    assert read_excluded(project.paths) == {} and read_trusted(project.paths) == {"a" * 64: "week2.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--trust", ""], 1, "is neither excluded nor quarantined"),
        (["--trust", "week2.jsonl", "--force"], 2, "leave --force and --push-to out"),
        (["--trust", "week2.jsonl", "--push-to", "origin"], 2, "leave --force and --push-to out"),
    ],
)
def test_trust_never_starts_a_retraining_and_takes_no_option_of_one(
    project: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, message: str
) -> None:
    monkeypatch.chdir(project.root)
    monkeypatch.setattr("flows.retraining.flow.run_retraining", lambda *_: pytest.fail("a retraining started"))
    project.paths.retraining.mkdir(parents=True)
    exclude(project.paths, {"week2.jsonl": "a" * 64}, "by hand")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["retrain", *arguments])
    assert done.exit_code == status and message in done.stderr, done.stderr
    assert read_trusted(project.paths) == {}


def test_without_a_commit_no_server_is_started(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(project.root / ".git")
    subprocess.run(["git", "init", "--quiet"], cwd=project.root, check=True)
    monkeypatch.chdir(project.root)
    monkeypatch.setattr("flows.retraining.flow.tied_temporary_server", lambda: pytest.fail("the server was started"))
    done = CliRunner().invoke(app, ["retrain"])
    assert done.exit_code == 1 and "no git commit yet" in done.stderr, done.output


def test_help_shows_the_present_option_only() -> None:
    text = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["retrain", "--help"]).stdout
    assert "--trust" in text and "--release" not in text
