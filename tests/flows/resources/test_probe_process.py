"""The probe's process."""

from dataclasses import replace
from pathlib import Path

import pytest
from resource_cases import batch, params

from flows.errors import EstimateError
from flows.paths import Paths
from flows.resources.batches import workload
from flows.resources.probe import SHAPES, Task, batches, write_shallow_base
from flows.resources.probe_launch import Probe
from flows.resources.probe_process import _by_size, measure
from flows.resources.sizes import with_blocks
from flows.stages.detect import without_weights


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_a_process_of_the_probe_measures_the_train_stages_own_steps(
    paths: Paths, tmp_path: Path, batching: str
) -> None:
    calibrated = {"calibration": {"method": "rounding"}}  # changes no size, and the probe's base has random weights
    chosen = params(
        train={"batching": batching, "pack_tokens": 64, "gradient_checkpointing": "selective"}, quantization=calibrated
    )
    work = workload(chosen, paths)
    base = tmp_path / "probe" / "base"
    write_shallow_base(without_weights(paths.base).config, base, 0)
    sizes = batches(work, is_first=True, most=SHAPES)
    found = measure(Task(chosen.model_dump(), str(base), **sizes, longest=work.longest, optimizer_steps=3), 1.5)
    assert [size for size, _ in found.training] == sorted({one.tokens for one in sizes["timed"]})
    assert [size for size, _ in found.evaluation] == sorted(one.tokens for one in sizes["evaluation"])
    assert all(seconds > 0 for _, seconds in (*found.training, *found.evaluation))
    assert min(found.loading, found.stepping, found.saving) > 0
    assert found.peak > 100 * 2**20  # a process with PyTorch in it
    assert found.importing == 1.5 and 0 <= found.shapes < found.peak


def test_the_shorter_of_two_passes_counts() -> None:
    assert _by_size([batch(4, 16), batch(4, 8), batch(8, 8)], [3.0, 1.0, 2.5]) == [(32, 1.0), (64, 2.5)]


@pytest.mark.slow
def test_the_process_runs_its_tasks_one_after_another(paths: Paths, tmp_path: Path) -> None:
    chosen = params()
    work = workload(chosen, paths)
    config, tasks = without_weights(paths.base).config, []
    for blocks in (1, 2):
        base = tmp_path / str(blocks) / "base"
        write_shallow_base(with_blocks(config, blocks), base, 0)
        sizes = batches(work, blocks == 1, SHAPES)
        tasks.append(Task(chosen.model_dump(), str(base), **sizes, longest=29, optimizer_steps=3))
    with Probe() as probe:
        one, two = probe.measure(tasks, 600)
    assert one.importing == two.importing > 0
    assert [size for size, _ in one.training] == [size for size, _ in two.training]
    assert one.shapes >= two.shapes == 0

    with Probe() as probe, pytest.raises(EstimateError, match="the probe, a few steps of a shallow model, failed: "):
        probe.measure([replace(tasks[0], base="no-such-folder")], 600)
