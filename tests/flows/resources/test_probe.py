"""The probe's extrapolation, interpolation, and errors."""

import json
from pathlib import Path

import pytest
from resource_cases import batch

from flows.errors import EstimateError
from flows.resources import probe as plan_probe
from flows.resources.probe import Measured, Task, depths, run_probe, seconds_of


def test_two_shallow_models_give_the_deep_one() -> None:
    def found(blocks: int) -> Measured:
        timings = [(100, 1.0 + blocks), (200, 1.0 + 3.0 * blocks)]
        return Measured(500 + 20 * blocks, 400 + 30 * blocks, 3, 0.5 * blocks, timings, timings, 0.1 * blocks, 1)

    for blocks in (5, 12, 30, 80):
        less, more = depths(blocks)
        assert 0 < less < more <= blocks
        whole = found(less).deeper(found(more), (less, more), blocks)
        assert whole.peak == pytest.approx(500 + 20 * blocks)
        assert whole.evaluation_peak == pytest.approx(400 + 30 * blocks)
        assert whole.training[1] == (200, pytest.approx(1 + 3.0 * blocks))
        assert whole.importing == 3
    assert depths(4) == (4,)


def test_batches_between_those_that_were_timed() -> None:
    timings = [(100, 1.0), (200, 3.0)]
    assert seconds_of([batch(1, 104)], timings) == pytest.approx(1.08)
    assert seconds_of([batch(1, 48), batch(1, 200)], timings) == pytest.approx(0.48 + 3.0)


def test_a_task_survives_the_way_into_its_process(tmp_path: Path) -> None:
    task = Task({"train": {}}, "base", [batch(2, 9)], [batch(1, 4)], 9, 5)
    (tmp_path / "task.json").write_text(json.dumps(plan_probe.asdict(task)))
    assert Task.read(tmp_path / "task.json") == task


def test_a_probe_that_fails_or_hangs_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task({}, "base", [], [], 9, 5)
    for script, said in (
        ("echo trouble >&2; echo 'error: no GPU' >&2; exit 1", "failed: no GPU"),
        ("kill -9 $$", "lack of memory; use --no-probe"),
        ("exec sleep 30", "longer than 0.5 seconds; allow more with --probe-timeout"),
    ):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(plan_probe.sys, "executable", str(program))
        with pytest.raises(EstimateError, match=said):
            run_probe(task, tmp_path, 0.5 if "sleep" in script else 60)
