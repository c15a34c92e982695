"""A second working tree of the repository at some commit, with the same git store, DVC cache and DVC remotes.

Its processes see the commit's code, parameters and data, and none of the user's current edits. Tags created in it are
the repository's.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows.errors import RepositoryError
from flows.runtime.git import Git, GitError
from flows.runtime.temporary import with_process

PREFIX = "peftcore-worktree-"
"""Prefix of the temporary folder for `flows.runtime.temporary.leftovers`."""


@contextmanager
def worktree_at(root: Path, commit: str) -> Iterator[Path]:
    """Yield the project's folder in a temporary working tree at `commit`, which is removed afterwards."""
    with TemporaryDirectory(prefix=with_process(PREFIX)) as parent:
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
        git.run_without_hooks("worktree", "add", "--quiet", "--detach", str(folder), commit)
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
