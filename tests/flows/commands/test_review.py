"""`peftcore review`: the last run's page without arguments, otherwise a comparison of what is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import peftcore


def test_review_says_where_the_page_is(here: Any) -> None:
    result = peftcore("review")
    assert result.exit_code == 0
    assert Path(result.stdout.strip()) == here.paths.review


def test_named_versions_are_compared_best_first(here: Any) -> None:
    here.register(loss=2.6, weight=2.0)
    done = peftcore("review", "v0.1.0", "v0.1.1")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.index("v0.1.1") < done.stdout.index("v0.1.0"), "the one with the lower test loss"
    page = here.root / "reports" / "comparison.html"
    assert f"page {page}" in done.stdout and "v0.1.0" in page.read_text()


def test_a_page_can_have_another_place_and_json_names_it(here: Any, tmp_path: Path) -> None:
    told = json.loads(peftcore("review", "v0.1.0", "--out", str(tmp_path / "mine.html"), "--json").stdout)
    assert told["page"] == str(tmp_path / "mine.html") and Path(told["page"]).exists()
    assert not (here.root / "reports" / "comparison.html").exists()
    assert json.loads(peftcore("review", "--json").stdout) == {"page": str(here.paths.review)}


def test_the_last_runs_page_has_one_place_only(here: Any, tmp_path: Path) -> None:
    refused = peftcore("review", "--out", str(tmp_path / "mine.html"))
    assert refused.exit_code == 2 and "it needs runs to compare" in refused.stderr
    assert not here.paths.review.exists()


def test_a_project_at_a_server_is_compared_with_the_runs_that_are_named(
    here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read_runs(names: list[str], root: Path) -> None:
        asked.append((names, root))
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.review.sources.read_runs", read_runs)
    assert peftcore("review", "v0.1.0", "--project", "ada/docs").exit_code == 130
    assert asked == [(["v0.1.0", "wandb:ada/docs"], here.root)]


def test_outside_of_a_pipeline_runs_need_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = peftcore("review", "v0.1.0")
    assert refused.exit_code == 1 and "need a pipeline" in refused.stderr


def test_a_parameter_of_a_trial_that_does_not_fit_is_one_message(here: Any) -> None:
    refused = peftcore("trial", "train.batch_size=0")
    assert refused.exit_code == 1
    assert "train.batch_size: 0 does not fit" in refused.stderr and refused.stdout == ""
