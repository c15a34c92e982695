"""The committed parameters: a retraining ignores uncommitted changes of params.yaml."""

from flows.errors import ParamsError, RepositoryError
from flows.params import Params
from flows.paths import from_here
from flows.registry.commit_params import PARAMS, committed_params
from flows.runtime.git import Git, GitError

MOST_COMMITS = 50
"""Commits of params.yaml that are searched for parameters that can be read."""


def head_params(git: Git) -> Params:
    """Return the committed parameters.

    Raises:
        RepositoryError: params.yaml is not committed.
        ParamsError: the committed params.yaml cannot be used.
    """
    try:
        return committed_params(git)
    except GitError as error:
        raise RepositoryError(
            f"{PARAMS} is not committed, and a retraining uses committed files only; "
            f"`git add {from_here(git.root, PARAMS)}` and `git commit`"
        ) from error


def last_readable_params(git: Git) -> Params | None:
    """Return the newest committed parameters that can be read, which say whom to notify; None if there are none."""
    for commit in git.run("rev-list", f"--max-count={MOST_COMMITS}", "HEAD", "--", PARAMS).split():
        try:
            return committed_params(git, commit)
        except (ParamsError, RepositoryError):  # the retraining itself reports errors of the newest parameters
            continue
    return None
