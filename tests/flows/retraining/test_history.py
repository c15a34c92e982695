"""The history of retrainings: one line for each, readable after a crash and after an update."""

import json
from pathlib import Path

import pytest

from flows.paths import Paths
from flows.retraining.history import Entry, append, entries


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def test_fields_of_another_release_in_the_history_are_left_out(paths: Paths) -> None:
    paths.retraining.mkdir(parents=True, exist_ok=True)
    paths.retraining_history.write_text('{"started": "2030-01-01", "mood": "good"}\n[1]\n{"outcome": "kept"}\n')
    assert [entry.started for entry in entries(paths)] == ["2030-01-01"]


def test_a_history_that_a_crash_cut_short_is_read_and_added_to(paths: Paths, caplog: pytest.LogCaptureFixture) -> None:
    append(paths, Entry("2026-01-01T00:00:00+00:00"))
    with paths.retraining_history.open("a") as file:
        file.write('{"started": "2026-01-08T0')
    append(paths, Entry("2026-01-15T00:00:00+00:00"))
    lines = paths.retraining_history.read_text().splitlines()
    assert len(lines) == 3
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[1])
    assert [entry.started[:10] for entry in entries(paths)] == ["2026-01-01", "2026-01-15"]
    assert "history.jsonl:2: incomplete line" in caplog.text


def test_entries_of_earlier_releases_have_their_fields_under_the_present_names(paths: Paths) -> None:
    paths.retraining.mkdir(parents=True)
    earlier = {
        "started": "2026-01-01",
        "fresh": ["a"],
        "unproven": ["b"],
        "set_aside": ["c"],
        "passed_over": {"d": "why"},
    }
    paths.retraining_history.write_text(json.dumps(earlier) + "\n")
    (entry,) = entries(paths)
    assert (entry.new_files, entry.quarantined, entry.excluded, entry.skipped) == (["a"], ["b"], ["c"], {"d": "why"})
