"""Batches by shape are those of the trainer."""

from pathlib import Path

import pytest
from resource_cases import params

from flows.errors import EstimateError
from flows.paths import Paths
from flows.resources.batches import BatchSize, RowSize, shapes, workload


def test_batches_are_the_trainers_own(paths: Paths) -> None:
    grouped = workload(params(), paths)
    assert (grouped.optimizer_steps, grouped.forward_passes) == (3, 6)
    assert sum(len(one.rows) for one in grouped.training) == 22
    assert grouped.largest.shape == (4, 32)  # rows of like length, rounded up to 8
    assert sum(one.tokens for one in grouped.training) < 1.3 * sum(range(8, 30))
    free = workload(params(train={"batching": "padding_free"}), paths)
    assert sum(one.tokens for one in free.training) == sum(range(8, 30))
    packed = workload(params(train={"batching": "packed", "pack_tokens": 64}), paths)
    assert packed.largest.tokens <= 64
    assert {one.shape[0] for one in packed.training} == {1}
    assert [one.shape for one in packed.evaluation] == [(6, 16)]
    assert sum(one.supervised for one in packed.training) == sum(n // 3 for n in range(8, 30))


def test_rows_that_are_not_prepared_are_full(tmp_path: Path) -> None:
    work = workload(params(data={"train_rows": 10}), Paths(tmp_path))
    assert (work.prepared, work.largest.shape, work.optimizer_steps) == (False, (4, 320), 2)
    with pytest.raises(EstimateError, match=r"train_rows is null .*run `dvc repro \S*prepare`"):
        workload(params(data={"train_rows": None}), Paths(tmp_path))


def test_a_pack_that_is_too_short_is_refused(paths: Paths) -> None:
    with pytest.raises(EstimateError, match=r"pack_tokens is 20: .* at least 29"):
        workload(params(train={"batching": "packed", "pack_tokens": 20}), paths)


def test_one_batch_of_each_shape_or_some_from_small_to_large() -> None:
    rows = [RowSize(tokens, 1) for tokens in (9, 30, 12, 64, 3, 21)]
    batches = tuple(BatchSize((row,), True) for row in rows)
    assert [one.shape[1] for one in shapes(batches, 9)] == [32, 16, 64, 8, 24]  # 9 and 12 tokens are both 16 wide
    assert [one.shape[1] for one in shapes(batches, 3)] == [64, 8, 24]
