"""The working tree of a retraining: a git working tree below .dvc/tmp, which an interrupted retraining finds again.

The tree is checked out at the repository's HEAD, so a retraining and the user's edits do not affect each other. Only
one retraining runs at a time, by a lock that the system frees with the process.
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
    """Return the retraining's folder, which git and DVC ignore."""
    return root / ".dvc" / "tmp" / "retraining"


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold the lock of retrainings. Raises BusyError at once if another retraining of this repository runs."""
    path = home(root) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise BusyError(f"busy: a retraining of {root} runs already ({who}); wait for it, or stop it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {this_host()}\n")
        file.flush()
        yield


def working_tree(root: Path) -> Path:
    """Return the project's folder in the working tree at HEAD.

    The tree of an interrupted retraining at the same commit is used again; otherwise a new one is made. It takes
    over the checkpoints of the tree before. Each checkpoint names the inputs of its run.
    """
    folder, note, saved = home(root) / "tree", home(root) / "tree.json", home(root) / "checkpoints"
    commit, project = (git := Git(root)).head(), folder / git.prefix
    interrupted = json.loads(note.read_text(encoding="utf-8")) if note.exists() and (folder / ".git").exists() else None
    if interrupted == {"commit": commit}:
        return project
    note.unlink(missing_ok=True)  # a tree that is half removed or half made is not used again
    checkpoints = Paths(project).checkpoints
    if checkpoints.is_dir():
        shutil.rmtree(saved, ignore_errors=True)
        checkpoints.rename(saved)
    remove_worktree(root, folder)
    add_worktree(root, folder, commit)
    if saved.is_dir():  # also after this function was killed
        saved.rename(checkpoints)
    write_atomically(note, json.dumps({"commit": commit}) + "\n")
    return project


def note_unfinished(root: Path, started: str) -> None:
    """Record that a retraining trains, until `forget_unfinished`. started: the time of its entry in the history."""
    write_atomically(home(root) / "unfinished", f"{started}\n")


def unfinished_since(root: Path) -> str | None:
    """Return the time that the last call of `note_unfinished` recorded; None if that retraining has a verdict."""
    note = home(root) / "unfinished"
    return note.read_text(encoding="utf-8").strip() or None if note.exists() else None


def is_unfinished(root: Path) -> bool:
    """Return True if the last retraining has no verdict: it failed, was killed, or ended in a conflict."""
    return (home(root) / "unfinished").exists()


def forget_unfinished(root: Path) -> None:
    """Record that the last retraining has a verdict."""
    (home(root) / "unfinished").unlink(missing_ok=True)


def remove_working_tree(root: Path) -> None:
    """Remove the working tree; the retraining's results are in the registry and in DVC's cache."""
    forget_unfinished(root)
    (home(root) / "tree.json").unlink(missing_ok=True)  # a tree that is half removed is not used again
    remove_worktree(root, home(root) / "tree")
