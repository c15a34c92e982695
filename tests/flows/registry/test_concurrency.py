"""Of processes that promote at once exactly one wins; the others exit with 4, and no tag of theirs stays.

PEFTCORE_ROUNDS=200 makes the long proof of what the suite tries three times; with `-s` each prints its figures.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ROUNDS = int(os.environ.get("PEFTCORE_ROUNDS", "3"))
WORKER = Path(__file__).parents[2] / "peftcore" / "support" / "promoting_process.py"
WON, CONFLICT = 0, 4

pytestmark = pytest.mark.timeout(600 + 10 * ROUNDS)


class Promoters:
    """Processes that were started once and promote together, each in its folder."""

    def __init__(self, stack: ExitStack, folders: list[Path], meeting: Path, push_to: str = "") -> None:
        self.processes = []
        for number, folder in enumerate(folders):
            command = [sys.executable, str(WORKER), str(meeting), str(number), str(len(folders)), push_to]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
            process = stack.enter_context(subprocess.Popen(command, cwd=folder, **pipes))
            stack.callback(process.kill)
            self.processes.append(process)
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"

    def promote(self, stage: str) -> list[dict[str, Any]]:
        """What each came to, when all of them promote to a stage at once."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{stage}\n")
        return [json.loads(process.stdout.readline()) for process in self.processes if process.stdout]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def stage_tags(project: Any, root: Path) -> dict[str, str]:
    """{tag: its object} of all promotions."""
    lines = project.git("for-each-ref", "--format=%(refname:strip=2) %(objectname)", "refs/tags", root=root).split("\n")
    return dict(line.split(" ") for line in lines if "#" in line)


def figures(kind: str, outcomes: Counter[int], stale: int, started: float) -> None:
    print(
        f"{kind}: {ROUNDS} rounds, {outcomes[WON]} winners, {outcomes[CONFLICT]} conflicts, "
        f"{stale} stale tags, {time.monotonic() - started:.0f} s"
    )


@pytest.mark.slow
@pytest.mark.faults("concurrent promotions", trials=ROUNDS)
def test_of_ten_processes_one_wins(registered: Any, tmp_path: Path, stack: ExitStack) -> None:
    (tmp_path / "meeting").mkdir()
    # each in its folder, so that each has its params.yaml; git's store is one
    roots = [tmp_path / f"tree{number}" for number in range(10)]
    for root in roots:
        shutil.copytree(registered.root, root, symlinks=True, ignore=shutil.ignore_patterns(".git"))
        (root / ".git").symlink_to(registered.root / ".git")
    promoters = Promoters(stack, roots, tmp_path / "meeting")
    outcomes, stale, started = Counter[int](), 0, time.monotonic()
    for number in range(1, ROUNDS + 1):
        found = promoters.promote(f"round{number}")
        statuses = Counter(one["status"] for one in found)
        outcomes += statuses
        assert statuses == {WON: 1, CONFLICT: 9}, found
        assert all("was faster" in one["stderr"] for one in found if one["status"] == CONFLICT)
        (winner,) = (json.loads(one["stdout"]) for one in found if one["status"] == WON)
        assert winner["tag"] == f"docstrings#round{number}#{number}"
        stale += len(stage_tags(registered, registered.root)) - number
    assert stale == 0
    figures("ten processes, one repository", outcomes, stale, started)


@pytest.mark.slow
@pytest.mark.faults("concurrent promotions", trials=ROUNDS)
def test_of_two_clones_one_wins_and_the_other_keeps_no_tag(registered: Any, tmp_path: Path, stack: ExitStack) -> None:
    (tmp_path / "meeting").mkdir()
    shared = tmp_path / "shared.git"
    registered.git("clone", "--quiet", "--bare", str(registered.root), str(shared))
    registered.git("remote", "add", "origin", str(shared))
    clones = [tmp_path / "one", tmp_path / "other"]
    for clone in clones:
        shutil.copytree(registered.root, clone, symlinks=True)
    promoters = Promoters(stack, clones, tmp_path / "meeting", push_to="origin")
    outcomes, stale, started = Counter[int](), 0, time.monotonic()
    for number in range(1, ROUNDS + 1):
        found = promoters.promote(f"round{number}")
        statuses = Counter(one["status"] for one in found)
        outcomes += statuses
        assert statuses == {WON: 1, CONFLICT: 1}, found
        there = stage_tags(registered, shared)
        assert list(there) == [f"docstrings#round{n}#{n}" for n in sorted(range(1, number + 1), key=str)]
        for clone, one in zip(clones, found, strict=True):
            here = stage_tags(registered, clone)
            stale += sum(there.get(tag) != object_ for tag, object_ in here.items())
            assert len(here) == (number if one["status"] == WON else number - 1)
            registered.git("fetch", "--quiet", "--tags", "origin", root=clone)
            assert stage_tags(registered, clone) == there
    assert stale == 0
    figures("two clones, one remote", outcomes, stale, started)
