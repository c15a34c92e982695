"""What all commands share: errors as exit codes, one document on stdout, and the folders that are meant."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors import SafetensorError

from flows.commands.common import adapter_and_base, at_stage, errors, holders, newest, one_document, project, writable
from flows.errors import (
    BaseModelError,
    BusyError,
    DataError,
    GateError,
    RegistryConflict,
    RegistryError,
    RepositoryError,
)
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from peftcore.errors import ConfigError


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError("no rows"), 1, "no rows"),
        (ConfigError("r must be positive"), 1, "r must be positive"),
        (GateError("too bad"), 3, "too bad"),
        (RegistryConflict("faster"), 4, "faster"),
        (BusyError("at work"), 4, "at work"),
        (KeyboardInterrupt(), 130, "interrupted; run the command again to continue"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full ([Errno 28] No space left on device)"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            1,
            "the disk is full (I/O error: No space left on device (os error 28))",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b.yaml"),
            1,
            "a/b.yaml: Permission denied; allow this user",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "a"),
            1,
            "a: Read-only file system; allow this user to read and",
        ),
    ],
)
def test_an_expected_error_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    with pytest.raises(SystemExit) as end, errors():
        raise error
    assert end.value.code == status
    written = capsys.readouterr()
    assert written.err.startswith(f"error: {message}") and written.err.count("\n") == 1
    assert written.out == ""


@pytest.mark.parametrize("bug", [KeyError("x"), FileNotFoundError("x"), ZeroDivisionError()])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)) as raised, errors():
        raise bug
    assert raised.value is bug


def test_of_a_command_that_tells_json_nothing_else_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with one_document(True):
        print("a library's chatter")
    print("{}")
    with one_document(False):
        print("a table")
    assert capsys.readouterr() == ("{}\na table\n", "a library's chatter\n")


def test_folders_that_are_given_need_no_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert adapter_and_base(Path("a"), Path("b")) == (Path("a"), Path("b"))
    with pytest.raises(RepositoryError, match="no pipeline in"):
        adapter_and_base(Path("a"), None)


def test_folders_that_are_not_given_are_the_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    paths = Paths(tmp_path)
    with pytest.raises(BaseModelError, match="artifacts/base; run `peftcore stage fetch`"):
        adapter_and_base(None, None)
    paths.base.mkdir(parents=True)
    assert adapter_and_base(None, None) == (paths.adapter, paths.base)
    assert adapter_and_base(Path("a"), None) == (Path("a"), paths.base)
    assert adapter_and_base(None, Path("b")) == (paths.adapter, Path("b"))
    paths.params.write_text("project: {name: tickets}\n")
    with project() as (params, found):
        assert (params.project.name, found) == ("tickets", paths)


def test_another_stage_leaves_the_other_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    params = Params.model_validate({"gate": {"approvals": 2}})
    assert at_stage(params, None) is params
    shadow = at_stage(params, "shadow")
    assert (shadow.gate.stage, shadow.gate.approvals) == ("shadow", 2)
    assert params.gate.stage == "champion"


@pytest.mark.parametrize("name", ["", "No Stage", "a#b", "-a"])
def test_a_stage_that_cannot_be_a_tag_is_a_usage_error(name: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a valid stage name") as refused:
        at_stage(Params(), name)
    assert refused.value.exit_code == 2


def test_versions_and_holders_are_those_of_the_tags(project: Any) -> None:
    def tag(name: str) -> None:
        project.git("tag", "--annotate", "--message=x", name)

    with pytest.raises(RegistryError, match="no version of docstrings yet; use `peftcore run`"):
        newest(registry_of(project.params, project.root))
    for number in ("v0.9.0", "v0.10.0"):
        project.git("commit", "--quiet", "--allow-empty", f"--message={number}")
        tag(f"docstrings@{number}")
    tag("other@v7.0.0")
    assert newest(registry_of(project.params, project.root)) == "v0.10.0", "by number, not by letter"
    assert holders(project.params, project.paths) == {}
    tag("docstrings#shadow#1")
    assert holders(project.params, project.paths) == {"shadow": "v0.10.0"}


def test_a_file_that_cannot_be_written_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for fits in (None, Path("file"), Path("new"), Path("new/folder/page.html"), tmp_path / "page.html"):
        assert writable(fits) == fits
    for name, message in (("", "is a folder; give a file"), ("file/page.html", "because .*file is no folder")):
        with pytest.raises(typer.BadParameter, match=message):
            writable(Path(name))
    monkeypatch.setattr("os.access", lambda _, mode: mode == os.F_OK)  # a folder that is read-only
    with pytest.raises(typer.BadParameter, match="that you can write to"):
        writable(Path("page.html"))
