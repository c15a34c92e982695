"""What a crash has left over, a clock going backwards, a repository that cannot be written, lost storage."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import DVC, PEFTCORE, done

from flows.errors import PipelineError
from flows.gate.promote import promote
from flows.registry.registry import Registry
from flows.runtime.git import Git

LOCK, LOST = "lock left by a crash", "lost DVC cache or remote"


def champion(project: Any) -> str | None:
    holder = Registry(Git(project.root), "docstrings").stages().get("champion")
    return holder.version if holder else None


@pytest.mark.proof
@pytest.mark.parametrize("back", [60, 400 * 24 * 3600])
def test_the_clock_goes_backwards_between_two_promotions(
    project: Any, fault: Any, monkeypatch: pytest.MonkeyPatch, back: int
) -> None:
    now = time.time
    with fault("clock going backwards"):
        with monkeypatch.context() as ahead:
            ahead.setattr("flows.runtime.git.time.time", lambda: now() + back)
            project.register()
            promote(project.params, project.paths)
        project.register(loss=2.6, weight=2.0)
        assert promote(project.params, project.paths).outcome == "promoted"
        assert champion(project) == "v0.1.1"
        gto = Path(sys.executable).with_name("gto")
        shown = subprocess.run([gto, "show", "--json"], cwd=project.root, check=True, capture_output=True)
        told = json.loads(shown.stdout)["docstrings"]
        assert (told["version"], told["stage"]["champion"]) == ("v0.1.1", "v0.1.1")


@pytest.mark.proof
def test_gits_index_lock_does_not_hinder_registering_and_promoting(project: Any, fault: Any) -> None:
    with fault(LOCK):
        (project.root / ".git" / "index.lock").touch()
        project.register()
        assert promote(project.params, project.paths).outcome == "promoted"


def test_a_lock_of_a_tag_is_named(registered: Any, fault: Any) -> None:
    lock = registered.root / ".git" / "refs" / "tags" / "docstrings#champion#1.lock"
    with fault(LOCK):
        lock.touch()
        with pytest.raises(PipelineError, match=r"docstrings#champion#1\.lock.*File exists"):
            promote(registered.params, registered.paths)
        assert champion(registered) is None
        lock.unlink()
        assert promote(registered.params, registered.paths).outcome == "promoted"


DEAD = json.dumps({"write": {"artifacts/adapter": {"pid": 2**22 + 1, "cmd": "dvc repro"}}, "read": {}})


@pytest.mark.parametrize(
    "rwlock",
    [
        pytest.param(DEAD, marks=pytest.mark.proof, id="of a dead process"),
        pytest.param(DEAD[:20], id="cut short"),
        pytest.param("", marks=pytest.mark.proof, id="empty"),
    ],
)
def test_dvcs_locks_do_not_hinder_a_stage(project: Any, fault: Any, rwlock: str) -> None:
    tmp = project.root / ".dvc" / "tmp"
    with fault(LOCK):
        (tmp / "lock").write_text("4194305")
        (tmp / "rwlock.lock").write_text("4194305")
        (tmp / "rwlock").write_text(rwlock)
        stage = done(project.root, *PEFTCORE, "stage", "make")
        assert stage.returncode == 0, stage.stderr


@pytest.mark.proof
def test_a_repository_that_cannot_be_written_stays_as_it_is(
    registered: Any, read_only: Callable[[Path], Path], fault: Any
) -> None:
    tags = registered.git("tag", "--list")
    (registered.root / "source" / "new").touch()
    read_only(registered.root)
    for command in (["promote"], ["stage", "make"], ["rollback", "--reason", "x"]):
        with fault("read-only repository"):
            refused = done(registered.root, *PEFTCORE, *command)
            assert refused.returncode == 1, refused.stderr
            assert "error: " in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
            assert registered.git("tag", "--list") == tags


def test_the_cache_is_gone_and_the_remote_is_enough(registered: Any, fault: Any) -> None:
    files = {file: file.read_bytes() for file in registered.paths.adapter.iterdir()}
    with fault(LOST):
        shutil.rmtree(registered.root / ".dvc" / "cache")
        shutil.rmtree(registered.paths.artifacts)
        assert done(registered.root, *DVC, "pull").returncode == 0
        assert {file: file.read_bytes() for file in registered.paths.adapter.iterdir()} == files


@pytest.mark.proof
def test_the_remote_is_gone_and_the_cache_is_enough(registered: Any, fault: Any) -> None:
    promote(registered.params, registered.paths)
    with fault(LOST):
        shutil.rmtree(registered.root / ".dvc-remote")
        registered.register(loss=2.6, weight=2.0)
        assert promote(registered.params, registered.paths).outcome == "promoted"
        shutil.rmtree(registered.root / ".dvc" / "cache")
        shutil.rmtree(registered.paths.artifacts)
        assert done(registered.root, *DVC, "pull").returncode == 0, "registering has filled the remote again"
