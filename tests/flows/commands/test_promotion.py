"""promote, rollback and approve from the command line: another stage, other people, and what scripts read."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import peftcore


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


def test_a_file_that_cannot_be_written_is_refused_before_the_promotion(here: Any) -> None:
    file = here.root / "params.yaml" / "verdict.md"
    refused = peftcore("promote", "--markdown", str(file))
    assert refused.exit_code == 2 and "cannot be written" in refused.stderr
    for command in (["review", "v0.1.0", "--out"], ["status", "--all", "--page"], ["ci", "--dry-run", "--report"]):
        assert peftcore(*command, str(file)).exit_code == 2
    assert "nothing is promoted yet" in peftcore("status", "--no-stages").stdout


def test_rolling_back(here: Any) -> None:
    peftcore("promote")
    assert peftcore("rollback", "--reason", "why").exit_code == 1
    here.register(loss=2.6, weight=2.0)
    peftcore("promote")
    back = peftcore("rollback", "--reason", "answers in capitals", "--json")
    assert (back.exit_code, json.loads(back.stdout)["outcome"]) == (0, "rolled back")
    assert "champion is v0.1.0" in peftcore("status").stdout


def test_a_refusal_exits_with_3_and_its_reason_and_json_stays_json(here: Any, caplog: pytest.LogCaptureFixture) -> None:
    here.paths.params.write_text(here.paths.params.read_text() + "gate: {min_loss_gain: 2.0}\n")
    result = peftcore("promote", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["report"]["reason"] == "gain in loss: 1.100 nats, at least 2"
    assert result.stderr == (
        "error: docstrings v0.1.0 is not promoted to champion: gain in loss: 1.100 nats, at least 2\n"
    )
    assert "uncommitted rules, and CI by the committed: params.yaml (`git add ../params.yaml && " in caplog.text


def test_an_unsigned_approval_is_said_to_prove_nothing(here: Any) -> None:
    here.git("config", "user.email", "grace@example.org")
    told = peftcore("approve", "--note", "fine").stdout.splitlines()
    assert told[0].startswith("docstrings v0.1.0 is approved by grace@example.org: approved/docstrings/v0.1.0/grace-")
    assert told[1].startswith("it proves nothing: anybody can set this e-mail")


def test_the_checks_are_a_table_and_a_failed_one_has_a_cross(here: Any) -> None:
    here.paths.params.write_text(here.paths.params.read_text() + "gate: {min_loss_gain: 2.0, stage: shadow}\n")
    refused = peftcore("promote", "--dry-run")
    marks = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in refused.stdout.splitlines() if "│" in line
    }
    assert (marks["gain in loss"], marks["manifest"]) == ("✗", "✓")
    assert "would become" not in refused.stdout and refused.exit_code == 3
