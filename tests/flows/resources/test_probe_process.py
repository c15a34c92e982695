"""One process of the probe."""

import random
from pathlib import Path

import pytest
from resource_cases import batch, params

from flows.paths import Paths
from flows.resources.batches import workload
from flows.resources.probe import Task, sequence, write_shallow_base
from flows.resources.probe_process import _smoothed, measure
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
    training, evaluation = sequence(work)
    found = measure(Task(chosen.model_dump(), str(base), training, evaluation, work.longest, 3), imported=1.5)
    assert [size for size, _ in found.training] == sorted({one.tokens for one in training})
    assert [size for size, _ in found.evaluation] == sorted(one.tokens for one in evaluation)
    assert all(seconds > 0 for _, seconds in (*found.training, *found.evaluation))
    assert min(found.loading, found.stepping, found.saving) > 0
    assert found.peak > 100 * 2**20  # a process with PyTorch in it


def test_times_are_smoothed_and_delays_left_out() -> None:
    batches = [batch(4, width) for width in range(8, 328, 8)]
    true = [0.05 + 2e-3 * one.tokens + 1e-6 * one.tokens * one.shape[1] for one in batches]
    rng = random.Random(0)
    noisy = [seconds * rng.uniform(0.97, 1.03) for seconds in true]
    noisy[7] *= 3
    noisy[20] *= 2
    assert [seconds for _, seconds in _smoothed(batches, noisy)] == pytest.approx(true, rel=0.02)
    assert _smoothed(batches[:1], [0.7]) == [(32, pytest.approx(0.7))]
