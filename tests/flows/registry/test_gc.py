"""Garbage collection: what a stage, the past, a branch or a working tree needs stays; the rest goes, and only that."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import RegistryError, RepositoryError
from flows.registry import gc
from flows.registry.gc import Collection, collect_garbage
from flows.registry.registry import Registry
from flows.runtime import processes
from flows.runtime.git import Git
from flows.runtime.worktree import PREFIX, worktree_at

PAST, REFUSED, CHAMPION, NEWEST = "v0.1.0", "v0.1.1", "v0.1.2", "v0.1.3"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test makes the repository that each has a copy of."""
    return tmp_path_factory.mktemp("versions") / "project"


@pytest.fixture
def versions(project: Any, made: Path) -> Any:
    """The project with four versions: a past champion, a refused one, the champion, the newest."""
    if not made.exists():
        shutil.copytree(project.root, made, symlinks=True)
        four = type(project)(made)
        for number in (1, 2, 3, 4):
            four.register(loss=3 - number / 10, weight=float(number))
        registry = registry_of(four)
        for event, number in enumerate((PAST, CHAMPION)):
            registry.assign("champion", registry.version(number), event, "m")
    shutil.rmtree(project.root)
    shutil.copytree(made, project.root, symlinks=True)
    return project


def registry_of(project: Any) -> Registry:
    return Registry(Git(project.root), "docstrings")


def has_files(project: Any, place: str, number: str) -> bool:
    """Whether each DVC object of a version, and of the folders among them, is there."""
    record = registry_of(project).record(registry_of(project).version(number))
    store = project.root / place / "files" / "md5"
    for digest in record["dvc"].values():
        path = store / digest[:2] / digest[2:]
        if not path.exists():
            return False
        inner = [entry["md5"] for entry in json.loads(path.read_text())] if digest.endswith(".dir") else []
        if not all((store / one[:2] / one[2:]).exists() for one in inner):
            return False
    return True


def there(project: Any, place: str) -> dict[str, bool]:
    return {number: has_files(project, place, number) for number in (PAST, REFUSED, CHAMPION, NEWEST)}


def objects(project: Any) -> dict[Path, int]:
    folders = (project.root / ".dvc" / "cache" / "files", project.root / ".dvc-remote")
    return {path: path.stat().st_size for one in folders for path in one.rglob("*") if path.is_file()}


def collect(project: Any, **options: Any) -> Collection:
    return collect_garbage(project.params, project.paths, **{"keep": 1, **options})


ALL = {PAST: True, REFUSED: True, CHAMPION: True, NEWEST: True}


@pytest.mark.slow
def test_only_what_nothing_needs_goes_and_a_dry_run_tells_the_same(versions: Any) -> None:
    before = objects(versions)
    told = collect(versions, remote=True, dry_run=True)
    assert objects(versions) == before and registry_of(versions).collected() == {}

    done = collect(versions)
    assert done.kept == {PAST: "was champion", CHAMPION: "is champion", NEWEST: "one of the 1 newest"}
    assert (done.collected, done.lost, done.remote) == ([REFUSED], [], None)
    assert there(versions, ".dvc/cache") == ALL | {REFUSED: False}
    assert there(versions, ".dvc-remote") == ALL, "only the cache was asked for"
    assert registry_of(versions).collected() == {}, "it can still be had"

    done = collect(versions, remote=True)
    gone = {path: size for path, size in before.items() if path not in objects(versions)}
    assert there(versions, ".dvc-remote") == ALL | {REFUSED: False}
    assert told.remote == done.remote and told.remote is not None and told.collected == [REFUSED]
    assert (told.cache.objects + told.remote.objects, told.cache.size + told.remote.size) == (
        len(gone),
        sum(gone.values()),
    )
    assert {number: tag.commit for number, tag in registry_of(versions).collected().items()} == {
        REFUSED: registry_of(versions).version(REFUSED).commit
    }
    with pytest.raises(RegistryError, match=r"the files of docstrings@v0\.1\.1 were collected"):
        registry_of(versions).assign("shadow", registry_of(versions).version(REFUSED), 2, "m")
    assert registry_of(versions).stages().keys() == {"champion"}
    assert collect(versions, remote=True).collected == [], "once"


def test_the_past_may_be_forgotten_and_what_a_branch_or_tag_needs_stays(versions: Any) -> None:
    versions.git("branch", "kept", f"docstrings@{REFUSED}^{{}}")
    assert collect(versions, forget_past=True).collected == [PAST]
    assert there(versions, ".dvc/cache") == ALL | {PAST: False}
    versions.git("branch", "--delete", "--force", "kept")
    versions.git("tag", "release", f"docstrings@{REFUSED}^{{}}")
    assert collect(versions, forget_past=True).collected == []


@pytest.mark.slow
def test_a_working_tree_keeps_what_it_has(versions: Any) -> None:
    with worktree_at(versions.root, registry_of(versions).version(REFUSED).commit) as tree:
        assert collect(versions).collected == []
        with pytest.raises(RepositoryError, match="DVC is busy in"), gc._locked(tree, []):
            collect(versions)
    assert there(versions, ".dvc/cache") == ALL


def test_a_promotion_between_looking_and_removing_loses_nothing(versions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    look, registry = gc._used, registry_of(versions)

    def promoted_meanwhile(*arguments: Any) -> Any:
        used = look(*arguments)
        if registry.last_event() == 2:
            registry.assign("champion", registry.version(REFUSED), 2, "m")
        return used

    monkeypatch.setattr(gc, "_used", promoted_meanwhile)
    done = collect(versions, remote=True)
    assert (done.collected, done.kept[REFUSED]) == ([], "is champion")
    assert there(versions, ".dvc-remote") == there(versions, ".dvc/cache") == ALL
    assert registry.collected() == {}


def test_the_same_adapter_is_a_new_version_once_the_old_ones_files_are_gone(versions: Any) -> None:
    collect(versions, remote=True)
    assert versions.register(loss=2.8, weight=2.0)["version"] == "v0.1.4"


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(
    versions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(processes, "this_host", lambda: f"{gethostname()}/machine/boot")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "temporary").mkdir()
    left = tmp_path / "temporary" / f"{PREFIX}{dead.pid}-abc"
    mine = left.with_name(f"{PREFIX}{os.getpid()}-abc")
    rebooted = left.with_name(f"{PREFIX}{os.getpid()}-machine.earlier-abc")
    for folder in (left, mine, rebooted):
        folder.mkdir()
        versions.git("worktree", "add", "--quiet", "--detach", str(folder / "tree"), "HEAD")
    (left / "tree" / "big").write_bytes(b"0" * 5000)
    assert set(collect(versions, dry_run=True).leftovers) == {str(left), str(rebooted)} and left.exists()
    assert collect(versions).leftovers[str(left)] >= 5000
    assert not left.exists() and not rebooted.exists() and mine.exists()
    assert versions.git("worktree", "list").count("\n") == 2


def test_as_a_command_with_what_the_registry_then_shows(versions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(versions.root)
    runner = CliRunner(env={"COLUMNS": "200"})
    told = runner.invoke(app, ["registry", "gc", "--keep", "1", "--dry-run"])
    assert told.exit_code == 0, told.stderr
    assert f"versions whose files would be removed: {REFUSED}" in told.stdout and "was champion" in told.stdout
    done = runner.invoke(app, ["registry", "gc", "--keep", "1", "--remote", "--json"])
    assert json.loads(done.stdout)["collected"] == [REFUSED]
    assert json.loads(done.stdout)["remote"]["size"] > 0
    rows = json.loads(runner.invoke(app, ["registry", "list", "--json"]).stdout)
    assert [row["version"] for row in rows if row["collected"]] == [REFUSED]
    assert "files collected" in runner.invoke(app, ["registry", "list"]).stdout
    assert "it had no stage" in runner.invoke(app, ["registry", "show", REFUSED]).stdout


def test_marks_that_were_not_pushed_are_pushed_by_the_next_collection(
    versions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = str(tmp_path / "shared.git")
    versions.git("init", "--quiet", "--bare", shared)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Git, "push_tags", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        collect(versions, remote=True, push_to=shared)
    assert there(versions, ".dvc-remote") == ALL
    collect(versions, remote=True, push_to=shared)
    assert there(versions, ".dvc-remote") == ALL | {REFUSED: False}
    assert f"collected/docstrings/{REFUSED}" in versions.git("ls-remote", "--tags", shared)


def test_a_remote_that_another_repository_uses_too_is_left_alone(versions: Any) -> None:
    stranger = versions.root / ".dvc-remote" / "files" / "md5" / "ab" / ("c" * 30)
    stranger.parent.mkdir(parents=True, exist_ok=True)
    stranger.write_text("registered by another repository")
    before = objects(versions)
    with pytest.raises(RepositoryError, match=r"holds 1 objects that this repository has never .* give --exclusive"):
        collect(versions, remote=True)
    assert objects(versions) == before and stranger.exists()
    assert collect(versions, remote=True, exclusive=True).collected
    assert not stranger.exists()


def test_files_of_kept_versions_stay_on_the_remote_if_the_cache_is_lost(versions: Any) -> None:
    shutil.rmtree(versions.root / ".dvc" / "cache")
    before = there(versions, ".dvc-remote")
    collection = collect(versions, remote=True)
    assert collection.lost == [] and before[REFUSED]
    assert there(versions, ".dvc-remote") == before | {REFUSED: False}


def test_a_damaged_list_of_files_on_the_remote_is_named_and_nothing_is_removed(versions: Any) -> None:
    shutil.rmtree(versions.root / ".dvc" / "cache")
    digest = registry_of(versions).record(registry_of(versions).version(CHAMPION))["dvc"]["artifacts/adapter"]
    path = versions.root / ".dvc-remote" / "files" / "md5" / digest[:2] / digest[2:]
    path.chmod(0o644)
    path.write_text("damaged")
    before = objects(versions)
    with pytest.raises(RepositoryError, match=f"damaged list of a folder's files, {digest}, so nothing was removed"):
        collect(versions, remote=True)
    assert objects(versions).items() >= before.items()
