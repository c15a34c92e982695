"""The command line: what each command prints, from any sub-folder, and one message and exit 1 for what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app


def peftcore(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.fixture
def registered(project: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    project.register()
    monkeypatch.chdir(project.root / "source")
    return project


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "stage",
        "status",
        "registry",
        "registry list",
        "registry show",
        "registry diff",
        "promote",
        "rollback",
        "review",
        "doctor",
    ],
)
def test_each_command_has_help(command: str) -> None:
    result = peftcore(*command.split(), "--help")
    assert result.exit_code == 0
    assert len(result.stdout) > 300


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
    assert json.loads(peftcore("registry", "show").stdout)["version"] == "v0.1.0"
    assert json.loads(peftcore("registry", "show", "v0.1.0").stdout)["evaluation_set"] == "e" * 64


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
    assert "differ in nothing" in peftcore("registry", "diff", "v0.1.0", "v0.1.0").stdout
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
    text = peftcore("status").stdout
    assert "modified source" in text
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
