"""`.peftcore/stages.yaml` changes for the stages whose installed code has changed, and for no other."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.errors import RepositoryError
from flows.runtime import stage_code
from flows.runtime.stage_code import FILE, code_digest, refresh, stage_file

STAGES = {
    "prepare": {"cmd": "exec python -m flows.stages.prepare"},
    "train": {"cmd": "exec python -m flows.stages.train"},
    "own": {"cmd": "make something"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    YAML().dump({"stages": STAGES}, tmp_path / "dvc.yaml")
    (tmp_path / ".peftcore").mkdir()
    (tmp_path / FILE).write_text(stage_file(STAGES))
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    return YAML(typ="safe").load(folder / FILE)["stages"]


def test_a_changed_module_changes_the_stages_that_import_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(folder)
    assert set(before) == {"prepare", "train"}  # another command has no code of ours
    assert not refresh(folder)
    original = stage_code.module_files
    (tmp_path / "changed.py").write_text("changed = True\n")

    def changed(module: str) -> dict[str, Path]:
        files = original(module)
        return files | {name: tmp_path / "changed.py" for name in files if name == "peftcore.methods.lora.adapter"}

    monkeypatch.setattr(stage_code, "module_files", changed)
    assert refresh(folder)
    after = digests(folder)
    assert after["prepare"] == before["prepare"] and after["train"] != before["train"]


def test_an_installed_version_is_looked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_code, "installed_version", lambda: "9.9")
    assert refresh(folder)
    monkeypatch.setattr(stage_code, "code_digest", lambda module: pytest.fail("the version is the same"))
    assert not refresh(folder)


def test_a_repository_without_the_file_is_left_alone(tmp_path: Path) -> None:
    assert not refresh(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / FILE).write_text("stages: [")
    with pytest.raises(RepositoryError, match="restore it from git"):
        refresh(folder)


def test_a_digest_is_the_same_in_every_folder() -> None:
    assert code_digest("flows.stages.prepare") == code_digest("flows.stages.prepare")
    assert code_digest("flows.stages.prepare") != code_digest("flows.stages.fetch")
