"""What a retraining goes by: the parameters that are committed, whatever is being edited meanwhile."""

from pathlib import Path
from tempfile import TemporaryDirectory

from flows.errors import ParamsError, RepositoryError
from flows.params import Params, load_params
from flows.runtime.git import Git, GitError

PARAMS = "params.yaml"
LOOKED_BACK = 50
"""Commits that changed the parameters, in which some that can be read are looked for."""


def committed_params(git: Git, commit: str = "HEAD") -> Params:
    """Return the parameters as they are in a commit. Raises ParamsError, or RepositoryError where it has none."""
    try:
        text = git.show(commit, PARAMS)
    except GitError as error:
        raise RepositoryError(
            f"{PARAMS} is not committed, and what is committed is what is trained; `git add {PARAMS}` and `git commit`"
        ) from error
    with TemporaryDirectory(prefix="peftcore-") as folder:
        path = Path(folder) / PARAMS
        path.write_text(text)
        return load_params(path)


def last_readable_params(git: Git) -> Params | None:
    """Return the newest committed parameters that can be read: who is to be told, if the present ones cannot."""
    for commit in git.run("rev-list", f"--max-count={LOOKED_BACK}", "HEAD", "--", PARAMS).split():
        try:
            return committed_params(git, commit)
        except (ParamsError, RepositoryError):  # what is wrong with the newest is the retraining's error
            continue
    return None
