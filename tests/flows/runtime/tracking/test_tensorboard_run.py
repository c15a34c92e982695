"""TensorBoard's event files hold the curves, pictures, tables and results of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.runtime.tracking import Tracker

pytest.importorskip("tensorboard", reason="the extra tensorboard is not part of the environment")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_a_run_and_its_evaluation_are_in_one_folder(tmp_path: Path) -> None:
    config = {"train": {"learning_rate": 0.5}}
    run = Tracker("docs", "offline", config, tmp_path, name="first", backends=["tensorboard"])
    (identity,) = run.run_ids.values()
    for step in range(1, 4):
        run.log({"step": step, "loss": 3.0 - step, "validation_loss": None})
    run.picture("ranks", np.zeros((4, 6, 4), np.uint8), 3)
    run.finish({"steps": 3}, tmp_path)
    continued = {"tensorboard": identity}
    later = Tracker("docs", "offline", config, tmp_path, backends=["tensorboard"], continued=continued)
    later.table("samples", [{"prompt": "a|b", "answer": "c\nd"}])
    later.finish({"adapter": {"loss": 2.5}})
    events = events_of(tmp_path / "tensorboard" / identity)
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 2), (2, 1), (3, 0)]
    assert events.Scalars("result/adapter/loss")[0].value == 2.5 and events.Scalars("result/steps")[0].value == 3
    assert events.Images("ranks")[0].width == 6
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| a\\|b | c<br>d |" in text
    assert identity.startswith("first-")


def test_a_full_disk_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    run = Tracker("docs", "offline", {}, tmp_path, backends=["tensorboard"])
    run.log({"step": 1, "loss": 1.0})
    run.finish({})
    assert run.run_ids == {} and len([one for one in caplog.messages if one.startswith("TensorBoard: ")]) == 1
