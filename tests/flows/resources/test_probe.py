"""The probe's batches, extrapolation and interpolation."""

import json
from dataclasses import asdict

import pytest
from resource_cases import batch

from flows.resources.batches import BatchSize, RowSize, Workload
from flows.resources.probe import (
    SHAPES,
    SHAPES_ON_CPU,
    Measured,
    Task,
    batches,
    depths,
    further_shapes,
    seconds_of,
)


def test_two_shallow_models_give_the_deep_one() -> None:
    def found(blocks: int) -> Measured:
        timings = [(100, 1.0 + blocks), (200, 1.0 + 3.0 * blocks)]
        return Measured(500 + 20 * blocks, 400 + 30 * blocks, 50, 3, 0.5 * blocks, timings, timings, 0.1 * blocks, 1)

    for blocks in (5, 12, 30, 80):
        less, more = depths(blocks)
        assert 0 < less < more <= blocks
        whole = found(less).deeper(found(more), (less, more), blocks)
        assert whole.peak == pytest.approx(500 + 20 * blocks)
        assert whole.evaluation_peak == pytest.approx(400 + 30 * blocks)
        assert whole.training[1] == (200, pytest.approx(1 + 3.0 * blocks))
        assert (whole.importing, whole.shapes) == (3, 50)
    assert depths(4) == (4,)


def test_batches_between_those_that_were_timed() -> None:
    timings = [(100, 1.0), (200, 3.0)]
    assert seconds_of([batch(1, 104)], timings) == pytest.approx(1.08)
    assert seconds_of([batch(1, 48), batch(1, 200)], timings) == pytest.approx(0.48 + 3.0)


def test_a_task_and_its_figures_survive_json() -> None:
    task = Task({"train": {}}, "base", [batch(2, 9)], [batch(3, 5)], [batch(1, 4)], 9, 5)
    assert Task.of(json.loads(json.dumps(asdict(task)))) == task
    figures = Measured(500, 400, 50, 3, 0.5, [(100, 1.0)], [(200, 2.0)], 0.1, 1)
    assert Measured.of(json.loads(json.dumps(asdict(figures)))) == figures


def test_only_the_first_model_sees_many_shapes() -> None:
    rows = [RowSize(width, 4) for width in range(8, 648, 8)]
    training = tuple(BatchSize((row,) * 4, True) for row in rows)
    work = Workload(training, (batch(8, 40), batch(8, 80)), 5, 5, 640, True)
    first, second = (batches(work, is_first, SHAPES) for is_first in (True, False))
    assert [one.shape for one in first["timed"]] == [(4, 8), (4, 328), (4, 640)] == [o.shape for o in second["timed"]]
    assert SHAPES - 3 < len(first["others"]) <= SHAPES - 1 and first["others"][-1] == work.largest
    assert second["others"] == []
    few = batches(work, True, SHAPES_ON_CPU)["others"]
    assert len(few) == SHAPES_ON_CPU + 1 and few[-1] == work.largest and {*few} <= {*further_shapes(work), work.largest}
    assert first["evaluation"] == second["evaluation"] == [batch(8, 80)]
