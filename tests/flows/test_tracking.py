import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb

from flows.tracking import Tracker


class _Run:
    id = "abc123"

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.summary: dict[str, Any] = {}
        self.finished: list[int] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What wandb.init was asked for, and the run that it gives."""
    seen = SimpleNamespace(modes=[], run=_Run(), failing=set())

    def init(**given: Any) -> _Run:
        seen.modes.append(given["mode"])
        if given["mode"] in seen.failing:
            raise OSError("server unreachable")
        return seen.run

    monkeypatch.setattr(wandb, "init", init)
    return seen


def test_records_are_mirrored_without_their_nulls(opened, tmp_path: Path) -> None:
    tracker = Tracker("p", "offline", {}, tmp_path)
    tracker.log({"step": 3, "loss": 2.5, "validation_loss": None})
    tracker.finish({"steps": 3})
    assert tracker.run_id is None and opened.run.logged == [({"loss": 2.5}, 3)]
    assert opened.run.summary == {"steps": 3} and opened.run.finished == [0]


def test_a_picture_is_mirrored(opened, tmp_path: Path) -> None:
    Tracker("p", "offline", {}, tmp_path).picture("ranks", np.zeros((4, 6, 4), np.uint8), 3)
    ((values, step),) = opened.run.logged
    assert step == 3 and values["ranks"].image.size == (6, 4)


def test_the_id_is_the_runs(opened, tmp_path: Path) -> None:
    assert Tracker("p", "offline", {}, tmp_path).run_id == "abc123"


def test_a_server_that_is_down_makes_the_run_an_offline_one(opened, tmp_path: Path, caplog) -> None:
    opened.failing.add("online")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("p", "online", {}, tmp_path)
    assert opened.modes == ["online", "offline"] and tracker.run_id == "abc123"
    assert caplog.text.count("server unreachable") == 1


def test_a_failure_is_warned_of_once_and_the_rest_is_silent(opened, tmp_path: Path, caplog, monkeypatch) -> None:
    tracker = Tracker("p", "offline", {}, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(opened.run, "log", full)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log({"step": step, "loss": 1.0})
        tracker.finish({})
    assert caplog.text.count("disk full") == 1 and tracker.run_id is None


def test_disabled_asks_for_nothing(opened, tmp_path: Path) -> None:
    tracker = Tracker("p", "disabled", {}, tmp_path)
    tracker.log({"step": 1})
    tracker.finish({}, tmp_path)
    assert opened.modes == [] and tracker.run_id is None


def test_a_run_that_failed_is_closed_as_failed(opened, tmp_path: Path) -> None:
    tracker = Tracker("p", "offline", {}, tmp_path)
    tracker.close()
    tracker.close()
    assert opened.run.finished == [1]


@pytest.mark.slow
def test_a_real_offline_run_can_be_written(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    tracker = Tracker("p", "offline", {"rate": 0.1}, tmp_path)
    run_id = tracker.run_id
    tracker.log({"step": 1, "loss": 2.0})
    tracker.finish({"steps": 1}, adapter)
    assert run_id and list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
