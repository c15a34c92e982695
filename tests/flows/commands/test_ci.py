"""`peftcore ci`: its options and their variables, the report, and JSON. Jobs: tests/flows/gate/test_ci.py."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import peftcore

CI = ("GITHUB_", "CI_", "PEFTCORE_CI_", "TAG_NAME", "BRANCH_NAME", "CHANGE_")


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests may themselves run as a job of some CI."""
    for name in os.environ:
        if name.startswith(CI):
            monkeypatch.delenv(name)


def test_rules_that_cannot_be_read_are_told_in_the_report(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    report, output = tmp_path / "gate.md", tmp_path / "output"
    done = peftcore("ci", "--rules", "gone", "--report", str(report), GITHUB_OUTPUT=str(output))
    assert done.exit_code == 1
    assert "the rules could not be read from gone" in report.read_text()
    assert "verdict=error\n" in output.read_text()


def test_a_named_version_is_judged_and_told_as_json(here: Any) -> None:
    done = peftcore("ci", "--version", "v0.1.0", "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["verdict"], told["version"]) == ("would promote", "v0.1.0")
    assert told["judged"] == [told["promotion"]] and told["promotion"]["report"]["passed"]
    report = here.root / "reports" / "gate.md"
    assert told["report"] == str(report)
    assert report.read_text().startswith("## ✅ docstrings v0.1.0 would become champion")


def test_variables_stand_for_options(here: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    variables = {"VERSION": "v0.1.0", "DRY_RUN": "1", "STAGE": "shadow", "REPORT": str(page)}
    done = peftcore("ci", **{f"PEFTCORE_CI_{name}": value for name, value in variables.items()})
    assert (done.exit_code, done.stdout) == (0, "docstrings v0.1.0 would become shadow\n"), done.stderr
    assert "would become shadow" in page.read_text()


def test_a_refusal_is_exit_code_3_with_its_report(here: Any) -> None:
    here.paths.params.write_text(here.paths.params.read_text() + "gate: {min_loss_gain: 2.0}\n")
    done = peftcore("ci", "--version", "v0.1.0", "--dry-run", "--json")
    assert (done.exit_code, done.stdout) == (3, ""), (done.stderr, done.exception)
    assert "is not promoted to champion: gain in loss: 1.100 nats, at least 2" in done.stderr
    assert "| gain in loss | ❌ |" in (here.root / "reports" / "gate.md").read_text()


def test_without_a_version_it_says_that_there_is_nothing_to_judge(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    done = peftcore("ci", "--dry-run")
    assert (done.exit_code, done.stdout) == (0, "nothing to judge\n"), done.stderr
