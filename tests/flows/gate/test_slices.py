"""Slices: one that is truly worse is found, and however many there are, chance alone seldom refuses."""

from collections.abc import Sequence
from typing import Any

import numpy
import pyarrow
import pytest

from flows.gate.slices import SMALL, Compared, SliceDifference, _holm, metric_differences, slice_differences
from flows.params import Slices


def table(losses: Sequence[float], slices: Sequence[str] | None = None) -> pyarrow.Table:
    ids = [f"row{n}" for n in range(len(losses))]
    columns: dict[str, Any] = {"id": ids, "tokens": [10] * len(ids), "adapter_loss": list(losses)}
    return pyarrow.table(columns if slices is None else {**columns, "slice": list(slices)})


def differences(by_slice: dict[str, Sequence[float]], resamples: int = 2000, **rule: Any) -> dict[str, SliceDifference]:
    names = [name for name, own in by_slice.items() for _ in own]
    values = numpy.concatenate([numpy.asarray(own, float) for own in by_slice.values()])
    base = 2.0 + numpy.random.default_rng(9).random(len(values))
    found = slice_differences(table(base + values, names), table(base), Slices(**rule), resamples, seed=1)
    return {one.name: one for one in found}


def noise(seed: int, mean: float, rows: int = 40, deviation: float = 0.1) -> numpy.ndarray:
    return numpy.random.default_rng(seed).normal(mean, deviation, rows)


def test_the_slice_that_is_worse_is_named() -> None:
    found = differences({"good": noise(0, -0.3), "even": noise(1, 0.0), "bad": noise(2, 0.5)})
    assert [name for name, one in found.items() if one.is_worse] == ["bad"]
    assert found["bad"].rows == 40 and found["bad"].mean == pytest.approx(0.5, abs=0.05) and found["bad"].p < 0.001
    assert not any(one.is_worse for one in differences({"bad": noise(2, 0.5)}, max_loss_regression=0.6).values())


def test_small_slices_are_looked_at_together() -> None:
    found = differences({"large": noise(0, 0.0), "one": noise(1, 0.5, 6), "two": noise(2, 0.5, 6)}, min_rows=10)
    assert set(found) == {"large", SMALL} and found[SMALL].rows == 12 and found[SMALL].is_worse


def test_rows_weigh_as_they_do_in_the_loss() -> None:
    ours, theirs = table([3.0, 2.0] * 10, ["a"] * 20), table([2.0, 2.0] * 10)
    heavy = ours.append_column("weight", pyarrow.array([9.0, 1.0] * 10))
    assert slice_differences(heavy, theirs, Slices(), 500, 1)[0].mean == pytest.approx(0.9)
    assert slice_differences(ours, theirs, Slices(), 500, 1)[0].mean == pytest.approx(0.5)


def test_a_table_without_slices_is_one() -> None:
    found = slice_differences(table([2.0] * 20), table([2.1] * 20), Slices(), 500, 1)
    assert [(one.name, one.rows) for one in found] == [("all rows", 20)]


def test_holm_by_hand() -> None:
    # 0.01 <= 0.05/4, 0.013 <= 0.05/3, 0.03 > 0.05/2: the third and all after it stay
    assert _holm([0.03, 0.01, 0.04, 0.013], 0.05) == [False, True, False, True]
    assert _holm([], 0.05) == []


def test_few_resamples_are_enough_for_many_slices() -> None:
    found = differences({f"s{n}": noise(n, 1.0 if n == 7 else 0.0, 20) for n in range(40)}, resamples=100)
    assert [name for name, one in found.items() if one.is_worse] == ["s7"]


def two_metrics(losses: dict[str, numpy.ndarray], scores: dict[str, numpy.ndarray], limit: float) -> Any:
    """The differences by slice of the loss and of a score, which is better if it is higher."""
    names = [name for name, own in losses.items() for _ in own]
    loss, score = (numpy.concatenate(list(by_slice.values())) for by_slice in (losses, scores))
    ours = table(loss, names).append_column("adapter_f1", pyarrow.array(score))
    theirs = table([0.0] * len(loss)).append_column("adapter_f1", pyarrow.array([0.0] * len(loss)))
    compared = [Compared("loss", "lower", limit, ours, theirs), Compared("f1", "higher", limit, ours, theirs)]
    return metric_differences(compared, Slices(), 400, 1)


def test_a_metric_that_is_better_if_higher_is_tested_the_other_way_round() -> None:
    even = {"a": noise(0, 0.0), "b": noise(1, 0.0)}
    found = two_metrics(even, {"a": noise(2, 0.9), "b": noise(3, -0.9)}, 0.2)
    assert [(one.metric, one.name, one.is_worse) for one in found] == [
        *(("loss", "a", False), ("loss", "b", False)),
        *(("f1", "a", False), ("f1", "b", True)),
    ]
    assert found[3].mean == pytest.approx(-0.9, abs=0.05)


def test_rows_without_a_value_are_in_no_slice_of_the_metric() -> None:
    values = [0.5] * 10 + [None] * 10
    ours = table([2.0] * 20, ["a"] * 20).append_column("adapter_f1", pyarrow.array(values))
    (found,) = metric_differences([Compared("f1", "higher", 0.1, ours, ours)], Slices(), 100, 1)
    assert (found.rows, found.mean, found.is_worse) == (10, 0.0, False)


@pytest.mark.slow
def test_the_correction_covers_the_slices_of_all_metrics_together() -> None:
    """Ten slices of two metrics, each exactly as much worse as is allowed: uncorrected, 64 % would be refused."""
    refused = uncorrected = 0
    for draw in range(60):
        losses, scores = (
            {f"s{n}": sign * noise(2000 * draw + first + n, 0.2, 40) for n in range(10)}
            for sign, first in ((1, 0), (-1, 1000))
        )
        found = two_metrics(losses, scores, 0.2)
        refused += any(one.is_worse for one in found)
        uncorrected += any(one.p <= 0.05 for one in found)
    assert refused <= 0.12 * 60 < 0.5 * 60 < uncorrected


@pytest.mark.slow
def test_chance_alone_seldom_refuses_twenty_slices() -> None:
    """Twenty slices, each exactly as much worse as is allowed: uncorrected, 64 % of the draws would be refused."""
    refused = uncorrected = 0
    for draw in range(150):
        slices = {f"s{n}": noise(1000 * draw + n, 0.2, 40) for n in range(20)}
        found = differences(slices, resamples=400).values()
        refused += any(one.is_worse for one in found)
        uncorrected += any(one.p <= 0.05 for one in found)
    assert refused <= 0.11 * 150 < 0.5 * 150 < uncorrected
