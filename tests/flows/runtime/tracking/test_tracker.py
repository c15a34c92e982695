"""A tracked run: mirrored to each backend, and never a reason for a run to fail."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from made_up_results import suite_result, write_results

from flows.params import Params
from flows.paths import Paths
from flows.runtime.tracking import Tracker, mirror_version


class _Run:
    id = "abc123"

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.summary: dict[str, Any] = {}
        self.finished: list[int] = []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What wandb.init was asked for, and the run that it gives."""
    seen = SimpleNamespace(modes=[], given=[], run=_Run(), failing=set(), sweeps=[])
    for name in ("WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_SWEEP_ID", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)

    def init(**given: Any) -> _Run:
        seen.modes.append(given["mode"])
        seen.given.append(given)
        seen.sweeps.append(os.environ.get("WANDB_SWEEP_ID"))
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
    assert opened.given[0]["id"] != opened.given[1]["id"], "W&B takes the first one's id as in use"
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


def test_an_evaluation_is_a_run_of_its_own_in_the_training_runs_group(opened, tmp_path: Path) -> None:
    Tracker("p", "offline", {}, tmp_path)
    Tracker("p", "offline", {"a": 1}, tmp_path, evaluates="t1", name="docs v0.1.0")
    trained, evaluated = opened.given
    assert trained["group"] == trained["id"] and trained["job_type"] == "train" and trained["name"] is None
    assert (evaluated["group"], evaluated["job_type"], evaluated["name"]) == ("t1", "evaluate", "docs v0.1.0")
    assert evaluated["config"] == {"a": 1, "evaluates": "t1"} and evaluated["id"] not in ("t1", trained["id"])


def test_in_a_sweep_training_has_the_agents_id_and_the_evaluation_is_outside_of_it(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "agents1")
    monkeypatch.setenv("WANDB_PROJECT", "the sweep's")
    Tracker("p", "offline", {}, tmp_path)
    Tracker("p", "offline", {}, tmp_path, evaluates="agents1")
    trained, evaluated = opened.given
    assert trained["id"] == "agents1" and evaluated["id"] != "agents1"
    assert [given["project"] for given in opened.given] == ["the sweep's"] * 2
    assert opened.sweeps == ["s1", None] and os.environ["WANDB_SWEEP_ID"] == "s1"


def test_a_dvc_experiment_gives_its_name_and_its_repositorys_folder(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "vocal-deme")
    Tracker("p", "offline", {}, tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1")
    (given,) = opened.given
    assert (given["name"], given["dir"]) == ("vocal-deme", str(tmp_path))


RECORD = {
    "name": "docs",
    "version": "v0.1.1",
    "wandb_run_id": "t1",
    "params": {"method": {"r": 8}},
    "metrics": {"adapter": {"loss": 2.5}},
}


def test_a_version_is_mirrored_with_its_samples_slices_and_registry_link(opened, tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    paths.evaluation.mkdir(parents=True)
    paths.samples.write_text(json.dumps([{"prompt": "p", "adapter": "a"}]))
    paths.evaluation_metrics.write_text(json.dumps({"slices": {"json": {"rows": 3, "adapter_loss": 2.0}}}))
    opened.run.log_artifact = lambda artifact: None
    paths.adapter.mkdir()
    mirror_version(Params(), paths, RECORD, "c0ffee", {"champion": SimpleNamespace(version="v0.1.0")})
    (samples, _), (slices, _) = opened.run.logged
    assert (samples["samples"].columns, samples["samples"].data) == (["prompt", "adapter"], [["p", "a"]])
    assert slices["slices"].data == [["json", 3, 2.0]]
    assert opened.run.summary == {
        "adapter": {"loss": 2.5},
        "registry": {
            "name": "docs",
            "version": "v0.1.1",
            "tag": "docs@v0.1.1",
            "commit": "c0ffee",
            "champion_then": "v0.1.0",
        },
    }
    assert opened.run.finished == [0] and opened.given[0]["config"]["evaluates"] == "t1"


def test_a_trial_is_mirrored_without_a_version(opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = Paths(tmp_path)
    paths.evaluation.mkdir(parents=True)
    paths.samples.write_text("[]")
    paths.evaluation_metrics.write_text(json.dumps({"slices": {}}))
    monkeypatch.setattr(Tracker, "register", lambda *_: pytest.fail("a trial is no version"))
    mirror_version(Params(), paths, RECORD, None, {})
    assert opened.run.summary == {"adapter": {"loss": 2.5}} and opened.given[0]["name"] == "docs trial"


def test_suites_are_mirrored_as_a_table_of_answers(opened, tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    write_results(paths.artifacts, suites={"support": suite_result({"b": "it lacks 'x'"})})
    opened.run.log_artifact = lambda artifact: None
    mirror_version(Params(), paths, RECORD, "c0ffee", {})
    tables = {name: table for values, _ in opened.run.logged for name, table in values.items()}
    assert tables["suites"].columns == ["suite", "id", "prompt", "must", "seed", "answer", "failed"]
    must = "must contain 'x'; must refuse"
    failed = "must contain 'x': it lacks 'x'"
    assert tables["suites"].data[1] == ["support", "b", "Tell <b>.", must, None, "<i>answer</i> b", failed]
    assert [row[-1] for row in tables["suites"].data] == ["", failed, ""]


def test_what_was_not_tracked_in_training_is_not_mirrored_later(opened, tmp_path: Path) -> None:
    mirror_version(Params(), Paths(tmp_path), RECORD | {"wandb_run_id": None}, "c0ffee", {})
    assert opened.given == []


def test_files_that_cannot_be_mirrored_are_no_reason_to_fail(opened, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        mirror_version(Params(), Paths(tmp_path), RECORD, "c0ffee", {})
    assert "samples.json" in caplog.text or "metrics.json" in caplog.text
    assert opened.run.finished == [1]


@pytest.mark.proof
def test_a_real_offline_run_can_be_written(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    tracker = Tracker("p", "offline", {"rate": 0.1}, tmp_path)
    run_id = tracker.run_id
    tracker.log({"step": 1, "loss": 2.0})
    tracker.finish({"steps": 1}, adapter)
    assert run_id and list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))


class Broken:
    """A backend that fails after its start."""

    id = "b1"

    def __init__(self, *_: Any) -> None:
        return

    def log(self, record: dict[str, Any]) -> None:
        raise OSError("gone")


def test_a_backend_that_fails_leaves_the_others(opened, tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr("flows.runtime.tracking.tracker.MlflowRun", Broken)
    tracker = Tracker("p", "offline", {}, tmp_path, backends=["mlflow", "wandb"])
    assert tracker.run_ids == {"mlflow": "b1", "wandb": "abc123"}
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log({"step": step, "loss": 1.0})
    assert caplog.text.count("MLflow: gone; the run continues, and its own log is complete") == 1
    assert tracker.run_ids == {"wandb": "abc123"} and len(opened.run.logged) == 3


@pytest.mark.parametrize("backend", ["mlflow", "tensorboard"])
def test_a_backend_that_is_not_installed_is_named_with_its_extra(
    opened, tmp_path: Path, caplog, monkeypatch, backend: Any
) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("p", "offline", {}, tmp_path, backends=[backend])
    assert f"pip install 'peftcore[{backend}]'" in caplog.text and tracker.run_ids == {}


def test_without_a_backend_nothing_is_asked_for(opened, tmp_path: Path) -> None:
    tracker = Tracker("p", "offline", {}, tmp_path, backends=[])
    tracker.log({"step": 1})
    assert opened.modes == [] and tracker.run_ids == {}
