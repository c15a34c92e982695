"""The notes of the running pipeline and of the last run."""

import json
import os
from pathlib import Path

import pytest

from flows.errors import GateError, StageError
from flows.paths import Paths
from flows.runtime.last_run import last_run, recorded, running, running_file


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


@pytest.mark.parametrize(
    ("error", "outcome", "status"),
    [
        (None, "promoted", 0),
        (StageError("stage make failed"), "failed", 1),
        (GateError("too bad"), "refused", 3),
        (KeyboardInterrupt(), "interrupted", 130),
        (SystemExit(143), "interrupted", 143),
    ],
)
def test_however_a_run_ends_it_is_written_down(
    paths: Paths, error: BaseException | None, outcome: str, status: int
) -> None:
    try:
        with recorded(paths) as record:
            with record.at("make"):
                assert running(paths) and not last_run(paths)
            if outcome in ("promoted", "refused"):
                record.promotion = {"outcome": outcome, "version": "v0.1.0"}
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    told = last_run(paths)
    assert told is not None and running(paths) is None
    assert (told["outcome"], told["status"]) == (outcome, status)
    assert list(told["seconds"]) == ["make"]
    assert told["failed_task"] == (None if outcome in ("promoted", "refused") else "make")


def test_the_note_of_a_run_names_this_process_and_its_task(paths: Paths) -> None:
    assert running(paths) is None and last_run(paths) is None
    with recorded(paths) as record, record.at("make"):
        note = running(paths)
        assert note is not None and (note["pid"], note["task"], note["alive"]) == (os.getpid(), "make", True)
        assert note["started"] == record.started
    told = last_run(paths)
    assert told is not None and told["started"] == note["started"] <= told["finished"]


def test_a_note_whose_process_is_another_one_by_now_is_of_a_run_that_was_killed(paths: Paths) -> None:
    with recorded(paths) as record, record.at("make"):
        note = json.loads(running_file(paths).read_text())
    running_file(paths).write_text(json.dumps(note | {"start_time": note["start_time"] - 1.0}))
    found = running(paths)
    assert found is not None and found["alive"] is False


def test_each_task_has_its_time_and_the_failed_one_is_named(paths: Paths) -> None:
    with pytest.raises(StageError), recorded(paths) as record:
        with record.at("make"):
            pass
        with record.at("register"):
            raise StageError("no space left")
    told = last_run(paths)
    assert told is not None and list(told["seconds"]) == ["make", "register"]
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    assert (told["failed_task"], told["error"], told["version"]) == ("register", "no space left", None)


def test_an_error_without_a_text_is_told_by_its_type(paths: Paths) -> None:
    with pytest.raises(KeyboardInterrupt), recorded(paths):
        raise KeyboardInterrupt
    told = last_run(paths)
    assert told is not None and told["error"] == "KeyboardInterrupt"
