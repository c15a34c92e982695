"""Differences between a project's files and the installed version are named, with what to do."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.errors import RepositoryError
from flows.project import outdated
from flows.project.create import pipeline_text
from flows.project.outdated import differences
from flows.runtime import stage_code
from flows.runtime.stage_code import FILE, refresh

ROOT = Path(__file__).parents[3]
PIPELINE = pipeline_text("tickets")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The two files of a project of the installed version."""
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / ".peftcore").mkdir()
    (tmp_path / FILE).write_text("peftcore: source\nstages: {}\n")
    return tmp_path


def test_a_project_of_the_installed_version_and_other_folders_have_no_differences(folder: Path) -> None:
    assert differences(folder) == []
    pipeline = YAML(typ="safe").load(PIPELINE)
    pipeline["stages"]["own"] = {"cmd": "make something"}
    pipeline["stages"]["train"]["deps"].append("data/teacher.jsonl")
    YAML().dump(pipeline, folder / "dvc.yaml")
    assert differences(folder) == []  # a user's own stages and dependencies are no differences
    assert differences(ROOT) == []


def test_what_a_pipeline_of_an_older_version_lacks_is_named(folder: Path) -> None:
    pipeline = YAML(typ="safe").load(PIPELINE)
    del pipeline["stages"]["calibrate"]
    pipeline["stages"]["fetch"]["params"].remove("data.special_tokens")
    pipeline["stages"]["train"]["deps"].remove("artifacts/calibrated")
    YAML().dump(pipeline, folder / "dvc.yaml")
    (sentence,) = differences(folder)
    assert "lacks stage calibrate, and parameters, dependencies or outputs of fetch, train, which " in sentence
    assert "`peftcore upgrade --write` writes it" in sentence


def test_another_installed_version_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outdated, "installed_version", lambda: "9.9")
    (sentence,) = differences(folder)
    assert "peftcore 9.9 is installed" in sentence and "last ran with source" in sentence


def test_a_stage_of_a_newer_version_is_refused_with_that_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = YAML(typ="safe").load(PIPELINE)
    pipeline["stages"]["distil"] = {"cmd": "exec python -m flows.stages.distil"}
    YAML().dump(pipeline, folder / "dvc.yaml")
    (folder / FILE).write_text("peftcore: 9.9\nstages: {distil: 0123456789abcdef}\n")
    monkeypatch.setattr(stage_code, "code_digest", lambda module: module)
    before = (folder / FILE).read_bytes()
    with pytest.raises(RepositoryError, match=r"no code of distil .* last ran with 9\.9: install that version"):
        refresh(folder)
    assert (folder / FILE).read_bytes() == before
    assert "no code of distil" in differences(folder)[0]
