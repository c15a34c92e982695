"""A run at Weights & Biases; `test_tracker` opens it, and `tests/flows/review/test_online` asks a server."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from flows.runtime.tracking.wandb_run import WandbRun


def test_a_run_that_cannot_be_opened_offline_either_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**given: Any) -> None:
        raise OSError(f"{given['mode']} is impossible")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(OSError, match="offline is impossible"):
        WandbRun("p", "online", {}, tmp_path)
    assert "online is impossible" in caplog.text and "offline is impossible" not in caplog.text


def test_the_kind_of_run_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def init(**options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(id="p1")

    monkeypatch.setattr(wandb, "init", init)
    run = WandbRun("p", "offline", {"a": 1}, tmp_path, "t1", "docs v0.1.0 champion", "promote")
    assert run.id == "p1" and (given["job_type"], given["group"]) == ("promote", "t1")
    assert given["config"] == {"a": 1, "evaluates": "t1"}
