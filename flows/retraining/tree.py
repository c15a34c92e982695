"""Where a retraining works: a git working tree of its own below .dvc/tmp, which an interrupted one finds again.

It is checked out at the commit that the repository has then; what the user edits meanwhile is not seen, and what a
retraining makes is not in the user's way. One at a time: a lock that the system frees with the process.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.errors import BusyError
from flows.paths import Paths
from flows.runtime.git import Git
from flows.runtime.processes import this_host
from flows.runtime.worktree import add_worktree, remove_worktree
from peftcore.files import write_atomically


def home(root: Path) -> Path:
    """The folder that git ignores and DVC does not look into."""
    return root / ".dvc" / "tmp" / "retraining"


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold the lock. Raises BusyError at once if another retraining of this repository runs."""
    path = home(root) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise BusyError(f"a retraining of {root} runs already ({who}); wait for it, or stop it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {this_host()}\n")
        file.flush()
        yield


def working_tree(root: Path) -> Path:
    """The tree at the repository's commit: that of an interrupted retraining if it began from there, else a new one.

    A new one takes over the checkpoints of the one before, each of which names all that its run is made of.
    """
    folder, note, saved = home(root) / "tree", home(root) / "tree.json", home(root) / "checkpoints"
    commit = Git(root).head()
    began = json.loads(note.read_text()) if note.exists() and (folder / ".git").exists() else None
    if began == {"commit": commit}:
        return folder
    left = Paths(folder).checkpoints
    if left.is_dir():
        shutil.rmtree(saved, ignore_errors=True)
        left.rename(saved)
    remove_worktree(root, folder)
    add_worktree(root, folder, commit)
    if saved.is_dir():  # also where this was killed before
        saved.rename(left)
    write_atomically(note, json.dumps({"commit": commit}) + "\n")
    return folder


def note_unfinished(root: Path) -> None:
    """Remember that a retraining trains, until `remove_working_tree`."""
    (home(root) / "unfinished").touch()


def is_unfinished(root: Path) -> bool:
    """Whether the last retraining that trained came to no verdict: it failed, was killed, or lost a race."""
    return (home(root) / "unfinished").exists()


def remove_working_tree(root: Path) -> None:
    """What a retraining that ended leaves: nothing; its results are in the registry and in DVC's cache."""
    remove_worktree(root, home(root) / "tree")
    for name in ("tree.json", "unfinished"):
        (home(root) / name).unlink(missing_ok=True)
