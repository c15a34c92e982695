"""retrain from the command line: trusted files, and the earlier name of the option."""

import json
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


def test_help_shows_the_present_option_only() -> None:
    text = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["retrain", "--help"]).stdout
    assert "--trust" in text and "--release" not in text
