"""A promotion that is ended anywhere is made or not made, and says so when it is run again."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from processes import PEFTCORE, done, started, told

from flows.gate.promote import promote
from flows.registry.registry import Registry
from flows.runtime.git import Git

TAGS = {0: ["docstrings@v0.1.0"], 1: ["docstrings#champion#1", "docstrings@v0.1.0"]}


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_promotion_ended_at_random_moments(
    registered: Any, tmp_path: Path, fault: Any, rounds: int, number: signal.Signals
) -> None:
    moments = random.Random(int(number))
    whole = time.monotonic()
    copy = tmp_path / "first"
    shutil.copytree(registered.root, copy, symlinks=True)
    assert done(copy, *PEFTCORE, "promote").returncode == 0
    seconds = time.monotonic() - whole
    for turn in range(rounds):
        root = tmp_path / str(turn)
        shutil.copytree(registered.root, root, symlinks=True)
        with fault({signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]):
            with started(root, *PEFTCORE, "promote") as command:
                time.sleep(moments.uniform(0.3, 1.1) * seconds)
                if command.poll() is None:
                    (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)
                # before Python has set its handlers, and while it imports, a signal ends it in its own way
                assert command.wait(180) in (0, 1, 130, 143, -number), told(root)
            assert registered.git("tag", "--list", root=root).split() in TAGS.values()
            assert done(root, *PEFTCORE, "promote").returncode == 0
            assert registered.git("tag", "--list", root=root).split() == TAGS[1]
            assert not list((root / "reports").glob(".*")) and not list((root / ".git").rglob("*.lock"))


class Ended(BaseException):
    """Stands for what ends a process between two steps: nothing after it runs."""


@pytest.mark.parametrize("row", ["Ctrl-C", "kill -9 of dvc, flow or stage"])
def test_a_promotion_ended_before_its_push_is_pushed_by_the_next(
    registered: Any, tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    shared = tmp_path / "shared.git"
    subprocess.run(["git", "init", "--quiet", "--bare", shared], check=True)
    registered.git("push", "--quiet", str(shared), "HEAD:refs/heads/main", "refs/tags/*:refs/tags/*")

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt if row == "Ctrl-C" else Ended

    with fault(row):
        with monkeypatch.context() as patch:
            patch.setattr(Git, "push_tags", end)
            if row != "Ctrl-C":  # nothing is tidied up after a kill
                patch.setattr(Git, "delete_tag", end)
            with pytest.raises((KeyboardInterrupt, Ended)):
                promote(registered.params, registered.paths, push_to=str(shared))
        promotion = promote(registered.params, registered.paths, push_to=str(shared))
        assert promotion.accepted
        there = subprocess.run(["git", "tag"], cwd=shared, check=True, capture_output=True, text=True).stdout
        assert there.split() == TAGS[1]
        assert Registry(Git(registered.root), "docstrings").stages()["champion"].version == "v0.1.0"


def test_a_tag_that_was_never_pushed_does_not_outlive_one_that_was(
    registered: Any, tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its push; meanwhile another clone has promoted, so the remote's tag is the one that counts."""
    shared = tmp_path / "shared.git"
    subprocess.run(["git", "init", "--quiet", "--bare", shared], check=True)
    registered.git("push", "--quiet", str(shared), "HEAD:refs/heads/main", "refs/tags/*:refs/tags/*")
    other = tmp_path / "other"
    shutil.copytree(registered.root, other, symlinks=True)
    theirs = Registry(Git(other), "docstrings")

    def end(*_: Any, **__: Any) -> None:
        raise Ended

    with fault("concurrent promotions"):
        with monkeypatch.context() as patch:
            patch.setattr(Git, "push_tags", end)
            patch.setattr(Git, "delete_tag", end)
            with pytest.raises(Ended):
                promote(registered.params, registered.paths, push_to=str(shared))
        theirs.assign("champion", theirs.version("v0.1.0"), 0, "theirs\n", push_to=str(shared))
        assert promote(registered.params, registered.paths, push_to=str(shared)).outcome == "already"
        assert Registry(Git(registered.root), "docstrings").stages()["champion"].message.startswith("theirs")
