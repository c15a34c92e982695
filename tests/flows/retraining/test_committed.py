"""Which committed parameters a retraining uses."""

from typing import Any

import pytest

from flows.errors import RepositoryError
from flows.retraining.committed import head_params, last_readable_params
from flows.runtime.git import Git


def test_uncommitted_parameters_are_an_error_that_says_what_to_do(project: Any) -> None:
    project.git("rm", "--quiet", "--cached", "params.yaml")
    project.git("commit", "--quiet", "--message=Gone")
    with pytest.raises(RepositoryError, match=r"params\.yaml is not committed.*git add params\.yaml"):
        head_params(Git(project.root))


def test_people_are_told_by_the_newest_parameters_that_can_be_read(project: Any) -> None:
    git = Git(project.root)
    project.paths.params.write_text("project: [")
    project.git("commit", "--quiet", "--all", "--message=Broken")
    found = last_readable_params(git)
    assert found is not None and found.project.name == "docstrings"
