"""Parameters of a commit, whatever the working tree holds."""

from typing import Any

import pytest

from flows.errors import ParamsError
from flows.registry.commit_params import committed_params
from flows.runtime.git import Git, GitError


def test_they_are_those_of_the_commit_and_not_of_the_working_tree(project: Any) -> None:
    first = project.git("rev-parse", "HEAD").strip()
    path = project.paths.params
    path.write_text(path.read_text() + "gate: {approvals: 2}\n")
    assert committed_params(Git(project.root)).gate.approvals == 0
    project.git("commit", "--quiet", "--all", "--message=Two people")
    path.write_text("project: [")
    assert committed_params(Git(project.root)).gate.approvals == 2
    assert committed_params(Git(project.root), first).gate.approvals == 0


def test_a_commit_without_them_or_with_broken_ones_is_an_error(project: Any) -> None:
    project.paths.params.write_text("project: {nam: docstrings}\n")
    project.git("commit", "--quiet", "--all", "--message=Broken")
    with pytest.raises(ParamsError, match="nam"):
        committed_params(Git(project.root))
    project.git("rm", "--quiet", "params.yaml")
    project.git("commit", "--quiet", "--message=Gone")
    with pytest.raises(GitError):
        committed_params(Git(project.root))
