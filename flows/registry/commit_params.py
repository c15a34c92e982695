"""Parameters as a commit has them, whatever the working tree holds."""

from pathlib import Path
from tempfile import TemporaryDirectory

from flows.params import Params, load_params
from flows.runtime.git import Git

PARAMS = "params.yaml"


def committed_params(git: Git, commit: str = "HEAD") -> Params:
    """Return the parameters of a commit.

    Args:
        git: the repository.
        commit: a commit or a branch.

    Raises:
        GitError: the commit has no params.yaml.
        ParamsError: its params.yaml cannot be used.
    """
    text = git.show(commit, PARAMS)
    with TemporaryDirectory(prefix="peftcore-params-") as folder:
        path = Path(folder) / PARAMS
        path.write_text(text, encoding="utf-8")
        return load_params(path)
