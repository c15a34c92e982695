"""promote, rollback and approve from the command line: another stage, other people, and what scripts read."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app


def peftcore(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_another_stage_has_its_own_champion_and_its_own_rollback(
    registered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(registered.root)
    page = tmp_path / "verdict.md"
    dry = peftcore("promote", "--stage", "shadow", "--dry-run", "--markdown", str(page), "--json")
    assert json.loads(dry.stdout)["stage"] == "shadow" and json.loads(dry.stdout)["outcome"] == "would promote"
    assert "docstrings v0.1.0 would become shadow" in page.read_text()
    assert "| forgetting | ✅ |" in page.read_text() and "| approval | ✅ | not required |" in page.read_text()
    assert "is shadow" in peftcore("promote", "--stage", "shadow").stdout
    registered.register(loss=2.6, weight=2.0)
    first = json.loads(peftcore("promote", "--json").stdout)
    assert first["report"]["champion"] is None, "nothing is champion yet"
    second = json.loads(peftcore("promote", "--stage", "shadow", "--json").stdout)
    assert second["report"]["champion"] == "v0.1.0" and second["tag"] == "docstrings#shadow#3"
    back = json.loads(peftcore("rollback", "--stage", "shadow", "--reason", "why", "--json").stdout)
    assert (back["stage"], back["version"]) == ("shadow", "v0.1.0")
    assert peftcore("rollback", "--reason", "why").exit_code == 1, "champion has had one holder only"
    for command in (["promote"], ["rollback", "--reason", "why"]):
        impossible = peftcore(*command, "--stage", "No Stage#1")
        assert impossible.exit_code == 2 and "is not a valid stage name" in impossible.stderr


def test_a_version_is_approved_and_then_promoted(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "params.yaml").write_text("project: {name: docstrings}\ngate: {approvals: 1}\n")
    monkeypatch.chdir(project.root)
    project.register()
    refused = peftcore("promote")
    assert refused.exit_code == 3 and "approval: 0 of 1" in refused.stderr
    mine = peftcore("approve", "--note", "fine")
    assert mine.exit_code == 1 and "cannot approve it as well; somebody else has to" in mine.stderr
    project.git("config", "user.email", "grace@example.org")
    made = json.loads(peftcore("approve", "v0.1.0", "--note", "fine", "--json").stdout)
    assert made["who"] == "grace@example.org" and made["tag"].startswith("approved/docstrings/v0.1.0/grace-")
    assert peftcore("approve", "--note", "fine").exit_code == 4
    assert peftcore("promote").exit_code == 0
