"""What git and DVC have of a run's inputs, and what is said of the rest."""

from types import SimpleNamespace
from typing import Any

import pytest

from flows.errors import DataError
from flows.runtime.git import Git
from flows.runtime.inputs import check_source_is_tracked, unused_changes
from flows.scaling import search
from flows.scaling.experiment import run_experiment
from flows.scaling.sweep import run_sweep


@pytest.fixture
def own(project: Any) -> Any:
    """A project whose data git does not have."""
    project.paths.params.write_text(project.paths.params.read_text() + "data: {source: data/qa.jsonl}\n")
    (project.root / "data").mkdir()
    (project.root / "data" / "qa.jsonl").write_text("{}\n")
    return project


def test_what_is_not_committed_is_listed(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (own.root / "notes.txt").touch()
    assert unused_changes(Git(own.root)) == (
        "data/qa.jsonl, params.yaml (`git add data params.yaml && git commit` includes them)"
    )
    monkeypatch.chdir(own.root / "data")
    assert "(`git add . ../params.yaml && git commit`" in unused_changes(Git(own.root))
    monkeypatch.chdir(own.root)
    assert unused_changes(Git(own.root), ["params.yaml"]).startswith("params.yaml (`git add params.yaml && ")
    for number in range(9):
        (own.root / "data" / f"{number}.jsonl").touch()
    assert " and 6 more (`git add data params.yaml && git commit`" in unused_changes(Git(own.root))
    own.git("add", "--all")
    own.git("commit", "--quiet", "--message=All")
    assert unused_changes(Git(own.root)) == ""


def test_a_trial_and_a_sweep_say_that_git_does_not_have_the_data(own: Any) -> None:
    words = r"data\.source data/qa\.jsonl is tracked neither by git nor by DVC, so a (trial|sweep).*`git add data/qa"
    with pytest.raises(DataError, match=words):
        run_experiment(own.root, [])
    with pytest.raises(DataError, match=words):
        run_sweep(own.root, ["train.batch_size=2,4"], "thread", 1, 60.0)


def test_a_search_needs_each_source_of_a_mixture(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = "[{name: old, source: data/qa.jsonl}, {name: new, source: data/new.jsonl}]"
    text = own.paths.params.read_text().replace("{source: data/qa.jsonl}", f"{{source: mixture, mixture: {mixture}}}")
    own.paths.params.write_text(text)
    own.git("add", "data/qa.jsonl")
    monkeypatch.setattr(search, "require_extra", lambda *_: None)  # Optuna may be absent
    monkeypatch.setattr(search, "read_space", lambda _: SimpleNamespace(corners=lambda: []))
    monkeypatch.setattr(search.Search, "run", lambda *_: [])
    with pytest.raises(DataError, match=r"data\.source data/new\.jsonl is tracked neither by git nor .* a search"):
        search.run_search(own.root, [], 2, None, 60.0)
    (own.root / "data" / "new.jsonl").touch()
    own.git("add", "data")
    assert search.run_search(own.root, [], 2, None, 60.0) == []


def test_a_registered_version_takes_untracked_data_along(own: Any) -> None:
    number = own.register()["version"]
    commit = Git(own.root).run("rev-parse", f"docstrings@{number}^{{commit}}").strip()
    assert "data/qa.jsonl" in own.git("ls-tree", "-r", "--name-only", commit).split()


@pytest.mark.parametrize(
    "source",
    [
        "data/qa.jsonl",
        "data/rows",
        "data/rows/",
        "./data/qa.jsonl",
        "data/./rows",
        "data/kept/a.jsonl",
        "/elsewhere/a.jsonl",
    ],
)
def test_what_git_or_dvc_has_is_enough(own: Any, source: str) -> None:
    git = Git(own.root)
    (own.root / "data" / "rows").mkdir()
    (own.root / "data" / "rows" / "a.jsonl").touch()
    (own.root / "data" / "kept.dvc").touch()
    own.git("add", "--all")
    check_source_is_tracked(git, source, "a test")
    own.git("commit", "--quiet", "--message=All")
    check_source_is_tracked(git, source, "a test", "HEAD")
    with pytest.raises(DataError):
        check_source_is_tracked(git, "data/other.jsonl", "a test", "HEAD")
