"""Detection of inputs that are in the working tree only. Commands that work on a commit do not see these inputs."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from flows.errors import DataError
from flows.paths import from_here
from flows.runtime.git import Git, GitError

INPUTS = ("params.yaml", "dvc.yaml", "data", "flows", "peftcore", ".peftcore")
"""Files and folders of a repository that can change the trained adapter."""
SHOWN = 5


def uncommitted_files(
    git: Git, *options: str, paths: Sequence[str] = (".",), excluded: Sequence[str] = ()
) -> list[str]:
    """Return the tracked files that differ from HEAD and the new files that git does not ignore, sorted.

    Args:
        git: the repository.
        options: further options of `git status`.
        paths: files and folders to look at.
        excluded: files to leave out.
    """
    patterns = [*paths, *(f":(exclude){name}" for name in excluded)]
    lines = git.run("status", "--porcelain", "-z", "--no-renames", *options, "--", *patterns).split("\0")
    # `git status` names files from the top of the repository
    return sorted(line[3:].removeprefix(git.prefix) for line in lines if line)


def unused_changes(git: Git, paths: Sequence[str] = INPUTS) -> str:
    """Return the names of uncommitted files and the git command that commits them, as text; "" if there are none.

    Args:
        git: the repository.
        paths: files and folders to look at; by default those of parameters, data and code.
    """
    changed = uncommitted_files(git, "--untracked-files=all", paths=paths)
    if not changed:
        return ""
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    added = " ".join(from_here(git.root, name) for name in sorted({name.partition("/")[0] for name in changed}))
    return f"{', '.join(changed[:SHOWN])}{more} (`git add {added} && git commit` includes them)"


def check_source_is_tracked(git: Git, source: str, what: str, commit: str | None = None) -> None:
    """Raise DataError if neither git nor DVC has the file or folder of `data.source`.

    Args:
        git: The repository.
        source: The value of data.source.
        what: Command that needs the source, such as "a trial"; for the error message.
        commit: Commit that must contain the source. None: the source must be in git's index.
    """
    if source.startswith(("stdlib:", "hub:", "/", "~", "..")):
        return
    if not is_committed(git, source, commit):
        path = from_here(git.root, source)
        raise DataError(
            f"data.source {source} is tracked neither by git nor by DVC, so {what} does not have it; "
            f"`git add {path}`, or `dvc add {path}` and `git add {from_here(git.root, f'{source}.dvc')}`, then "
            "`git commit`"
        )


def is_committed(git: Git, source: str, commit: str | None) -> bool:
    """Return True if git or DVC has a file or folder in a commit; commit None: in git's index."""
    names = _names(git, commit)
    source = PurePosixPath(source).as_posix()  # records of earlier releases have paths such as ./data/rows/
    above = [source, *(source[:at] for at, mark in enumerate(source) if mark == "/")]
    by_dvc = any(f"{path}.dvc" in names for path in above)
    return by_dvc or any(name == source or name.startswith(f"{source}/") for name in names)


def _names(git: Git, commit: str | None) -> set[str]:
    try:
        listed = git.run("ls-files", "-z") if commit is None else git.run("ls-tree", "-r", "-z", "--name-only", commit)
    except GitError as error:
        raise DataError(f"git cannot list the files of data.source: {error}") from error
    return set(listed.split("\0"))
