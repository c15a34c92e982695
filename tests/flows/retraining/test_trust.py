"""Files of rows that retrainings leave out, and files that a person trusts in spite of a doubt."""

import json
from typing import Any

import pytest

from flows.errors import BusyError, DataError
from flows.registry.reader import Version
from flows.retraining import trust as lists
from flows.retraining.data import Source, has_been_tried, note_tried
from flows.retraining.tree import only_one
from flows.retraining.trust import exclude, read_excluded, read_trusted, trust

ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


@pytest.fixture
def clone(project: Any) -> Any:
    """A repository in which nothing was retrained yet."""
    project.paths.retraining.mkdir(parents=True)
    return project


def test_at_first_nothing_is_excluded_or_trusted(clone: Any) -> None:
    assert (read_excluded(clone.paths), read_trusted(clone.paths)) == ({}, {})


def test_an_excluded_file_is_listed_by_its_content_with_its_name_and_the_reason(clone: Any) -> None:
    exclude(clone.paths, {"week2.jsonl": ONE}, "v0.1.1 was refused; far off")
    exclude(clone.paths, {"week3.jsonl": TWO}, "by hand")
    assert read_excluded(clone.paths) == {
        ONE: "week2.jsonl: v0.1.1 was refused; far off",
        TWO: "week3.jsonl: by hand",
    }
    exclude(clone.paths, {"week2.jsonl": ONE}, "v0.1.2 was refused")
    assert read_excluded(clone.paths)[ONE] == "week2.jsonl: v0.1.2 was refused", "the newest reason"


@pytest.mark.parametrize("name", ["week2.jsonl", ONE])
def test_a_file_is_trusted_by_its_name_or_its_digest_and_no_longer_excluded(clone: Any, name: str) -> None:
    exclude(clone.paths, {"week2.jsonl": ONE, "week3.jsonl": TWO}, "by hand")
    assert trust(clone.params, clone.paths, name) == [ONE]
    assert read_trusted(clone.paths) == {ONE: "week2.jsonl"}
    assert list(read_excluded(clone.paths)) == [TWO]


def test_all_files_of_one_name_are_trusted_together(clone: Any) -> None:
    exclude(clone.paths, {"rows.jsonl": ONE}, "by hand")
    exclude(clone.paths, {"rows.jsonl": TWO, "other.jsonl": THREE}, "by hand")
    assert sorted(trust(clone.params, clone.paths, "rows.jsonl")) == [ONE, TWO]
    assert list(read_excluded(clone.paths)) == [THREE]


def test_trusting_a_file_lets_the_same_files_be_tried_again(clone: Any) -> None:
    files = {"week1.jsonl": ONE, "week2.jsonl": TWO}
    note_tried(clone.paths, files, "v0.1.0")
    exclude(clone.paths, {"week3.jsonl": THREE}, "by hand")
    assert has_been_tried(clone.paths, files)
    trust(clone.params, clone.paths, "week3.jsonl")
    assert not has_been_tried(clone.paths, files)


def test_a_file_that_a_version_was_not_evaluated_by_can_be_trusted_once(
    clone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = Version("v0.1.0", "docstrings@v0.1.0", "0", 0, "")
    monkeypatch.setattr(lists, "versions_before", lambda *_: [version, version])
    monkeypatch.setattr(Source, "quarantined_of", lambda *_: {"week2.jsonl": TWO})
    assert trust(clone.params, clone.paths, "week2.jsonl") == [TWO]
    assert read_trusted(clone.paths) == {TWO: "week2.jsonl"} and read_excluded(clone.paths) == {}
    with pytest.raises(DataError, match=r"week2\.jsonl is neither excluded nor quarantined; these files are: none"):
        trust(clone.params, clone.paths, "week2.jsonl")


def test_a_running_retraining_whose_end_changes_the_lists_is_waited_for(clone: Any) -> None:
    exclude(clone.paths, {"week2.jsonl": ONE}, "by hand")
    with only_one(clone.root), pytest.raises(BusyError, match=r"a retraining of .* runs already"):
        trust(clone.params, clone.paths, "week2.jsonl")
    assert (list(read_excluded(clone.paths)), read_trusted(clone.paths)) == ([ONE], {})


def test_another_name_is_refused_with_the_names_that_there_are(clone: Any) -> None:
    exclude(clone.paths, {"week3.jsonl": TWO, "week2.jsonl": ONE}, "by hand")
    before = clone.paths.excluded.read_text()
    with pytest.raises(DataError, match=r"these files are: week2\.jsonl, week3\.jsonl$"):
        trust(clone.params, clone.paths, "week9.jsonl")
    assert clone.paths.excluded.read_text() == before and not clone.paths.trusted.exists()
    assert json.loads(before)
