"""Names of runs: folders, versions, stages and experiments, each found once or refused with what to give."""

from pathlib import Path
from typing import Any

import pytest

from flows.errors import ReviewError
from flows.review.sources import pipeline_root, read_runs


@pytest.mark.parametrize(
    ("name", "message"),
    [("exp:", "there is no DVC experiment yet"), ("ada/docs", "wandb:ada/docs for a server's project")],
)
def test_what_is_not_there_is_named_with_what_to_do(project: Any, name: str, message: str) -> None:
    with pytest.raises(ReviewError, match=message):
        read_runs([name], project.root)


def test_outside_of_a_pipeline_only_tracked_runs_are_found() -> None:
    with pytest.raises(ReviewError, match=r"v0\.1\.0 is not a folder of W&B runs, and versions .* need a pipeline"):
        read_runs(["v0.1.0"], None)


def test_a_pipeline_is_found_from_its_sub_folders_and_elsewhere_there_is_none(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root / "source")
    assert pipeline_root() == project.root
    monkeypatch.chdir(tmp_path)
    assert pipeline_root() is None
