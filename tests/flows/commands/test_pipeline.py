"""The commands of the pipeline: run, stage and status, as text and as JSON. doctor and plan are tested elsewhere."""

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from command_line import peftcore


def test_status_tells_stages_and_champion(here: Any) -> None:
    peftcore("promote")
    source = here.root / "source" / "merge.json"
    source.write_text(source.read_text() + " ")
    status = json.loads(peftcore("status", "--json").stdout)
    assert status["stages"] == {"make": ["modified source"], "register": ["has not run yet"]}
    assert status["registry"] == {"champion": "v0.1.0"}
    assert status["champion"]["version"] == status["candidate"]["version"] == "v0.1.0"
    text = peftcore("status").stdout
    assert "modified source" in text
    assert "v0.1.0, promoted" in text
    assert "docstrings: champion is v0.1.0" in text


def test_status_of_all_projects(two_projects: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two_projects[0].root.parents[1])
    table = peftcore("status", "--all", "--page", "projects.html").stdout
    assert "projects/mail" in table and "projects/sql" in table
    assert "projects/sql" in Path("projects.html").read_text()
    told = json.loads(peftcore("status", "--all", "--json").stdout)
    assert [one["name"] for one in told] == ["mail", "sql"]
    assert peftcore("status", "--page", "one.html").exit_code == 2
    monkeypatch.chdir(tmp_path)
    assert peftcore("status", "--all").exit_code == 1


@pytest.mark.slow
def test_a_run_told_as_json_is_one_document_whatever_came_of_it(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_server(*_: object) -> NoReturn:
        raise RuntimeError("Failed to reach API")

    monkeypatch.setattr("flows.pipeline.flow.pipeline", no_server)
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
    assert list(told["seconds"]) == ["check", "promote", "review"]


@pytest.mark.slow
def test_a_stage_that_did_not_change_runs_only_by_force(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root / "source")
    script = project.root / "make.py"
    script.write_text(script.read_text() + "print('made', file=open('made', 'a'))\n")
    made = project.root / "made"
    told = json.loads(peftcore("stage", "make", "--json").stdout)
    assert told["stage"] == "make" and told["seconds"] > 0
    assert peftcore("stage", "make").exit_code == 0
    assert made.read_text().count("made") == 1
    assert peftcore("stage", "make", "--force").exit_code == 0
    assert made.read_text().count("made") == 2


def test_status_of_a_disk_that_cannot_be_written_leaves_the_stages_out(
    here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.commands.pipeline.os.access", lambda *_: False)
    shown = peftcore("status")
    assert shown.exit_code == 0, shown.stderr
    assert "DVC cannot write its lock in .dvc" in " ".join(shown.stdout.split())
    assert "stages" not in json.loads(peftcore("status", "--json").stdout)


def test_status_without_stages_asks_dvc_nothing(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    monkeypatch.setattr("flows.commands.pipeline.stage_states", lambda _: pytest.fail("DVC was asked"))
    told = json.loads(peftcore("status", "--no-stages", "--json").stdout)
    assert "stages" not in told and told["registry"] == {}
