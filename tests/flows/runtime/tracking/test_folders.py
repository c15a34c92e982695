"""A run's own files are kept where they outlive a temporary working tree."""

from pathlib import Path

import pytest

from flows.retraining.tree import home
from flows.runtime.tracking.folders import lasting_folder


@pytest.mark.parametrize("inner", [".dvc/tmp/exps/standalone/tmp1", ".dvc/tmp/exps/temp/tmp1/inner"])
def test_an_experiment_has_its_repositorys_folder(tmp_path: Path, inner: str) -> None:
    assert lasting_folder(tmp_path / inner) == tmp_path.resolve()


def test_a_retraining_has_its_repositorys_folder(tmp_path: Path) -> None:
    assert lasting_folder(home(tmp_path) / "tree") == tmp_path.resolve()


def test_any_other_folder_is_its_own(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / ".dvc" / "tmp", tmp_path / "exps" / "a"):
        assert lasting_folder(folder) == folder
