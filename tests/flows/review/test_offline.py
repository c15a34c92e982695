"""Runs that W&B wrote without a server: whole ones, and what is left of those that were killed, cut or damaged."""

import json
import shutil
from pathlib import Path

import pytest
from tracked_runs import LOSSES, PROMPT, RATES, STEPS

from flows.errors import ReviewError
from flows.review.offline import find, read
from flows.review.run import joined


def test_a_run_and_its_evaluation_are_one(offline_runs: Path) -> None:
    runs = joined(read(find(offline_runs)))
    assert {run.name for run in runs} == set(RATES)
    run = next(run for run in runs if run.name == "right")
    assert run.state == "finished" and not run.warnings
    assert (run.config["train.learning_rate"], run.config["method.name"]) == (5e-4, "lora")
    assert run.summary["adapter.loss"] == LOSSES["right"] and run.summary["steps"] == STEPS
    assert run.version == "v0.1.1"
    assert [step for step, _ in run.history["loss"]] == list(range(1, STEPS + 1))
    assert run.history["validation_loss"] == [(STEPS, LOSSES["right"] + 0.01)]
    (sample,) = run.samples
    assert (sample["prompt"], sample["adapter"]) == (PROMPT, "<script>alert('right')</script>")


def test_what_was_tracked_of_it(offline_runs: Path) -> None:
    logs = [path.read_bytes() for path in find(offline_runs)]
    assert all(b"proc.memory.rssMB" in log for log in logs), "W&B's own samples of the machine"
    assert sum(b"file://" in log and b"adapter_model.safetensors" in log for log in logs) == len(RATES)


@pytest.mark.parametrize("given", ["wandb", "its parent", "a run", "a log", "the link to the latest"])
def test_where_runs_are_looked_for(offline_runs: Path, given: str) -> None:
    one = sorted(offline_runs.glob("offline-run-*"))[0]
    (log,) = one.glob("*.wandb")
    every = {
        "wandb": (offline_runs, 6),
        "its parent": (offline_runs.parent, 6),
        "a run": (one, 1),
        "a log": (log, 1),
        "the link to the latest": (offline_runs / "latest-run", 1),
    }
    folder, number = every[given]
    assert len(find(folder)) == number


def test_a_folder_without_runs_says_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(ReviewError, match=r"holds no W&B run; give a folder such as wandb/offline-run"):
        find(tmp_path)


def test_a_killed_run_is_read_as_far_as_it_got(killed_run: Path) -> None:
    (run,) = read([killed_run])
    assert run.state == "unfinished"
    assert run.name == "killed" and run.config == {"train.learning_rate": 1e-3}
    points = run.history["loss"]
    assert len(points) > 100
    assert points == [(step, pytest.approx(1 / step)) for step in range(1, len(points) + 1)]
    assert "the run was not finished" in run.warnings[0]


def test_a_truncated_log_is_read_up_to_the_cut(killed_run: Path, tmp_path: Path) -> None:
    cut = tmp_path / killed_run.name
    cut.write_bytes(killed_run.read_bytes()[:20_000])
    (run,) = read([cut])
    (whole,) = read([killed_run])
    points = run.history["loss"]
    assert 10 < len(points) < len(whole.history["loss"])
    assert points == whole.history["loss"][: len(points)]
    assert run.state == "unfinished" and run.warnings


def test_a_flipped_byte_costs_the_records_around_it(killed_run: Path, tmp_path: Path) -> None:
    content = bytearray(killed_run.read_bytes())
    content[40_000] ^= 0xFF
    damaged = tmp_path / killed_run.name
    damaged.write_bytes(content)
    (run,) = read([damaged])
    assert any("corrupt" in warning for warning in run.warnings)
    (whole,) = read([killed_run])
    assert set(run.history["loss"]) <= set(whole.history["loss"])
    assert len(run.history["loss"]) > 50


@pytest.mark.parametrize("content", [b"", b"no log at all, but long enough to look like one" * 9])
def test_what_is_no_log_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run-abc.wandb"
    path.write_bytes(content)
    with pytest.raises(ReviewError, match=r"run-abc\.wandb"):
        read([path])


@pytest.mark.parametrize(
    ("table", "warning"),
    [("gone", "cannot be read"), ("broken", "cannot be read"), ("a list", "not a table"), ("a link", "outside")],
)
def test_a_table_that_cannot_be_read_is_a_warning(offline_runs: Path, tmp_path: Path, table: str, warning: str) -> None:
    original = next(path for path in offline_runs.glob("offline-run-*") if list(path.glob("files/media/table/*")))
    shutil.copytree(original, tmp_path / original.name)
    (path,) = (tmp_path / original.name).glob("files/media/table/*")
    path.unlink()
    if table == "broken":
        path.write_text('{"columns": [')
    elif table == "a list":
        path.write_text("[]")
    elif table == "a link":
        outside = tmp_path / "secret.json"
        outside.write_text(json.dumps({"columns": ["prompt"], "data": [["secret"]]}))
        path.symlink_to(outside)
    (run,) = read(find(tmp_path / original.name))
    assert run.samples == ()
    assert any(warning in told for told in run.warnings), run.warnings
