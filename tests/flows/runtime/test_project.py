"""The repository as DVC sees it: its root, its order, what changed, files of another commit."""

import os
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sql_urls import make_url

from flows.errors import RepositoryError
from flows.runtime import project as project_module
from flows.runtime.project import (
    changed_stages,
    dvc,
    files_at,
    find_root,
    set_prefect_environment,
    stage_order,
    stage_states,
)

DIAMOND = """\
stages:
  last: {cmd: "true", deps: [left.txt, right.txt]}
  right: {cmd: touch right.txt, deps: [first.txt], outs: [right.txt]}
  left: {cmd: touch left.txt, deps: [first.txt], outs: [left.txt]}
  first: {cmd: touch first.txt, outs: [first.txt]}
"""


def test_the_root_is_found_from_a_folder_within(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_root(project.root / "artifacts" / "adapter") == project.root
    monkeypatch.chdir(project.root / "source")
    assert find_root() == project.root


def test_no_pipeline_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"no pipeline in .*`peftcore init`"):
        find_root(tmp_path)


def test_each_stage_comes_after_what_it_depends_on_wherever_one_is(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.root / "dvc.yaml").write_text(DIAMOND)
    monkeypatch.chdir(project.root / "source")
    order = stage_order(project.root)
    assert (order[0], order[-1]) == ("first", "last")
    assert set(order[1:3]) == {"left", "right"}


def test_a_broken_dvc_yaml_is_named(project: Any) -> None:
    (project.root / "dvc.yaml").write_text("stages: {one: {outs: [a]}}\n")
    with pytest.raises(RepositoryError, match=r"dvc\.yaml"):
        stage_order(project.root)


def test_changes_are_told_in_words(project: Any) -> None:
    assert changed_stages(project.root, ["make"]) == {}
    source = project.root / "source" / "merge.json"
    source.write_text(source.read_text() + " ")
    changed = changed_stages(project.root)
    assert changed["make"] == ["modified source"]
    assert changed.keys() == {"make", "register"}


def test_a_failing_command_gives_dvcs_reason(project: Any) -> None:
    with pytest.raises(RepositoryError, match=r"`dvc get .*nothing.* failed"):
        dvc(project.root, "get", ".", "nothing")


def test_a_full_disk_in_dvcs_message_gets_advice(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "ERROR: unexpected error - [Errno 28] No space left on device")
    monkeypatch.setattr(project_module.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RepositoryError, match="No space left on device; free some space, such as by"):
        dvc(project.root, "push")


@pytest.mark.parametrize("text", ["", "stages: ["])
def test_a_lock_file_that_a_full_disk_has_cut_is_named_with_what_to_do(project: Any, text: str) -> None:
    project.git("add", "dvc.lock")
    project.git("commit", "--quiet", "--message=Lock")
    (project.root / "dvc.lock").write_text(text)
    for look in (stage_states, changed_stages, stage_order):
        with pytest.raises(RepositoryError, match=r"(?s)dvc\.lock.*; restore it by `git checkout dvc\.lock`"):
            look(project.root)
    project.git("checkout", "dvc.lock")
    assert stage_states(project.root) == {"make": [], "register": ["has not run yet"]}


def test_files_that_are_nowhere_are_named_alike_each_time(project: Any) -> None:
    project.git("add", "dvc.lock")
    project.git("commit", "--quiet", "--message=Lock")
    commit = project.git("rev-parse", "HEAD").strip()
    shutil.rmtree(project.root / ".dvc" / "cache")
    messages = []
    for _ in range(2):
        with pytest.raises(RepositoryError) as raised, files_at(project.root, commit, ["artifacts/merge.json"]):
            pass
        messages.append(str(raised.value))
    assert messages[0] == messages[1]  # `serve --watch` warns once of one message
    assert messages[0].startswith(f"DVC cannot get artifacts/merge.json of {commit[:10]}: ")
    assert messages[0].endswith("; check the DVC remote, or `dvc push` it from a machine that has it")
    assert "Having any troubles" not in messages[0]


def test_files_of_another_commit_come_at_their_paths_and_go_again(project: Any) -> None:
    project.git("add", "dvc.lock")
    project.git("commit", "--quiet", "--message=Lock")
    commit = project.git("rev-parse", "HEAD").strip()
    before = project.paths.merge_report.read_text()
    project.make(loss=2.0)
    with files_at(project.root, commit, ["artifacts/merge.json", "artifacts/adapter"]) as folder:
        assert (folder / "artifacts" / "merge.json").read_text() == before
        assert (folder / "artifacts" / "adapter" / "adapter_config.json").is_file()
    assert not folder.exists()


def test_files_come_while_other_commands_use_dvcs_databases(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.git("add", "dvc.lock")
    project.git("commit", "--quiet", "--message=Lock")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    name = "artifacts/merge.json"
    dvc(project.root, "get", ".", name, "--rev", "HEAD", "--out", str(tmp_path / "got"))  # makes the databases
    databases = [sqlite3.connect(file, isolation_level=None) for file in (tmp_path / "site").rglob("*.db")]
    assert databases
    for database in databases:
        database.execute("BEGIN EXCLUSIVE")
    with files_at(project.root, "HEAD", [name, "artifacts/adapter"]) as folder:
        assert (folder / name).read_text() == project.paths.merge_report.read_text()
    for database in databases:
        database.close()


@pytest.mark.parametrize("name", ["plain", "100%20 (1)", "what?"])
def test_prefects_database_is_in_the_project_whatever_its_folder_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(variable)
    home = tmp_path / name / ".prefect"
    set_prefect_environment(home.parent)
    assert os.environ["PREFECT_HOME"] == str(home)
    # Prefect's own default
    url = os.environ.get("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{home}/prefect.db")
    assert make_url(url).database == str(home / "prefect.db")


def test_a_configured_database_of_prefect_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://host/prefect")
    set_prefect_environment(tmp_path / "100%20")
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in os.environ
