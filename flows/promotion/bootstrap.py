"""Whether one model's losses are really lower than another's: a paired bootstrap over test rows.

A row weighs what it weighs in the test loss (as much as it has supervised tokens, or its own weight), so the mean is
the difference of the two test losses.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy
from numpy.typing import NDArray

from flows.errors import GateError

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 500
"""Resamples held in memory together."""

Floats = NDArray[numpy.float64]


class Paired(NamedTuple):
    """The rows (n) that two tables share."""

    weights: Floats
    ours: Floats
    theirs: Floats
    ids: list[str]


def paired_losses(ours: "pyarrow.Table", theirs: "pyarrow.Table") -> Paired:
    """Weights and losses of the rows that both tables have, matched by id."""
    left, right = _by_id(ours), _by_id(theirs)
    shared = sorted(name for name in left.keys() & right.keys() if left[name][0] > 0)
    weights = numpy.array([left[name][0] for name in shared], dtype=numpy.float64)
    ours_there, theirs_there = (numpy.array([side[name][1] for name in shared], dtype=float) for side in (left, right))
    return Paired(weights, ours_there, theirs_there, shared)


def _by_id(table: "pyarrow.Table") -> dict[str, tuple[float, float]]:
    weight = "weight" if "weight" in table.column_names else "tokens"  # of a table without row weights
    ids, weights, losses = (table.column(name).to_pylist() for name in ("id", weight, "adapter_loss"))
    rows = dict(zip(ids, zip(weights, losses, strict=True), strict=True))
    if len(rows) != len(ids):
        raise GateError("test rows share an id, so they cannot be paired; prepare the data again")
    return rows


def paired_bootstrap(
    weights: Floats, ours: Floats, theirs: Floats, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """(mean, upper) of ours minus theirs in nats per token; upper: its one-sided bound at `confidence`.

    weights, ours, theirs: (n), n >= 1.
    """
    means = resampled_means(weights, ours - theirs, resamples, seed)
    return float(numpy.average(ours - theirs, weights=weights)), float(numpy.quantile(means, confidence))


def resampled_means(weights: Floats, differences: Floats, resamples: int, seed: int) -> Floats:
    """Weighted means (resamples) of rows drawn with replacement; weights, differences: (n), n >= 1."""
    weighted = weights * differences
    generator = numpy.random.default_rng(seed)
    means = numpy.empty(resamples)
    for start in range(0, resamples, AT_ONCE):
        size = (min(AT_ONCE, resamples - start), len(weights))
        drawn = generator.integers(len(weights), size=size)
        means[start : start + AT_ONCE] = weighted[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    return means
