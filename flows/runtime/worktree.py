"""A second working tree of the repository at some commit, with the same git store, DVC cache and DVC remotes.

Its processes see the commit's code, parameters and data, and none of the user's current edits. Tags created in it are
the repository's.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from flows.errors import RepositoryError
from flows.runtime.git import Git, GitError
from flows.runtime.processes import is_noted_alive, this_host

PREFIX = "peftcore-worktree-"
"""Prefix of the temporary folder; a process number and digests of the host follow, which identify leftovers if several
hosts share the temporary folder."""


@contextmanager
def worktree_at(root: Path, commit: str) -> Iterator[Path]:
    """Yield the project's folder in a temporary working tree at `commit`, which is removed afterwards."""
    with TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-{_host()}-") as parent:
        folder = Path(parent) / "tree"
        project = add_worktree(root, folder, commit)
        try:
            yield project
        finally:
            remove_worktree(root, folder)


def add_worktree(root: Path, folder: Path, commit: str) -> Path:
    """Check out `commit` in the new folder `folder`, on no branch; returns the project's folder in it.

    Raises:
        RepositoryError: The working tree could not be created, `commit` does not have the project, or the repository
            is a submodule.
    """
    git = Git(root)
    if git.run("config", "--default", "", "--get", "core.worktree").strip():
        raise RepositoryError(
            f"{git.top} is a git submodule, and DVC cannot work in a second working tree of one; clone its repository "
            "to a folder of its own, and run this there"
        )
    git.run("worktree", "prune")
    try:
        git.run("worktree", "add", "--quiet", "--detach", str(folder), commit)
    except GitError as error:
        raise RepositoryError(f"no working tree of {commit[:10]} could be created in {folder}: {error}") from error
    project = folder / git.prefix
    if not (project / ".dvc").is_dir():
        remove_worktree(root, folder)
        raise RepositoryError(f"commit {commit[:10]} has no project {git.prefix or root.name}; commit its files first")
    _share_dvc(root, project)
    return project


def remove_worktree(root: Path, folder: Path) -> None:
    """Remove a working tree with its files and git's entry."""
    git = Git(root)
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(GitError):  # it is not locked, unless `git worktree add` was killed while it made the tree
        git.run("worktree", "unlock", str(folder))
    git.run("worktree", "prune")


def leftovers() -> list[Path]:
    """Return temporary folders of this user's working trees whose process was killed."""
    folders = []
    for folder in sorted(Path(gettempdir()).glob(f"{PREFIX}*")):
        process, *rest = folder.name.removeprefix(PREFIX).split("-")
        is_own = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
        note = {"pid": process}
        if len(rest) > 1:  # earlier releases noted no host
            note["host"] = f"{gethostname()}/{rest[0].replace('.', '/')}"
        if is_own and process.isdigit() and is_noted_alive(note) is False:
            folders.append(folder)
    return folders


def _host() -> str:
    """Return the digests of `this_host` as a part of a file name."""
    return this_host().partition("/")[2].replace("/", ".")


def _share_dvc(root: Path, folder: Path) -> None:
    """Point the working tree's DVC to the cache and remotes of `root`.

    Settings of this machine (.dvc/config.local, perhaps with passwords) are copied.
    """
    from configobj import ConfigObj
    from dvc.config import Config

    local = root / ".dvc" / "config.local"
    target = folder / ".dvc" / "config.local"
    if local.exists():
        shutil.copyfile(local, target)
        target.chmod(0o600)
    config: Any = Config(str(root / ".dvc"), validate=False)
    # DVC reads UTF-8, but its own `Config.edit` writes no path with other characters than ASCII
    edited: Any = ConfigObj(str(target), encoding="utf-8", interpolation=False)
    edited.setdefault("cache", {})["dir"] = config["cache"].get("dir") or str(root / ".dvc" / "cache")
    for name, remote in config["remote"].items():
        edited.setdefault(f'remote "{name}"', {})["url"] = str(remote["url"])
    edited.write()
