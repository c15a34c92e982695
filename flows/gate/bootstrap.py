"""Whether one model's losses are really lower than another's: a paired bootstrap over test rows.

A row weighs what it weighs in the test loss (as much as it has supervised tokens, or its own weight), so the mean is
the difference of the two test losses.
"""

from collections.abc import Iterator
from math import inf
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy
from numpy.typing import NDArray
from scipy.special import stdtrit

from flows.errors import GateError

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 500
"""Resamples held in memory together."""

ROUNDING = 1e-12
"""Relative; what is smaller is none."""

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
    """(mean, upper) of ours minus theirs in nats per token; upper: its one-sided bound at `confidence`, infinite for
    rows so few that each being better by chance is likelier than it allows.

    The bound is as far above the mean as the farthest of three: the resamples' upper percentile; their lower one, as
    rows that happen to be better on one side say little of the other; and the studentized bootstrap's bound (Efron and
    Tibshirani, 1993, chapter 12.5), which is the farthest where a few rows are much worse.
    weights, ours, theirs: (n), n >= 1.
    """
    differences = ours - theirs
    mean = float(numpy.average(differences, weights=weights))
    if 0.5 ** len(weights) > 1 - confidence:
        return mean, inf
    means, errors = _resampled(weights, differences - mean, resamples, seed)
    share = expanded(confidence, weights)
    low, high = numpy.quantile(means, [1 - share, share])
    distance = float(max(high, -low))
    error = _error(weights, differences - mean)
    if error <= ROUNDING * float(abs(differences).max()):  # all rows differ alike
        return mean, mean + distance
    # a resample whose rows differ alike has no error, and its mean is infinitely many of them away
    far = numpy.where(abs(means) > ROUNDING * error, numpy.copysign(inf, means), 0.0)
    deviations = numpy.divide(means, errors, out=far, where=errors > ROUNDING * error)
    lowest = float(numpy.quantile(deviations, 1 - confidence, method="lower"))  # between infinities none can be taken
    return mean, mean + max(distance, -lowest * float(error))


def expanded(confidence: float, weights: Floats) -> float:
    """The share of resamples to take for a bound at `confidence`: some more of few rows, which resamples make look
    surer than they are (Hesterberg, 2015, "expanded percentiles"). Of rows that weigh unequally as many count as would,
    alike, lose as large a part of their variance by being taken about their own mean.
    """
    parts = weights / weights.sum()
    lost = 2 * (parts**3).sum() / (parts**2).sum() - (parts**2).sum()
    n = max(2.0, 1 / float(lost))
    return NormalDist().cdf((n / (n - 1)) ** 0.5 * float(stdtrit(n - 1, confidence)))


def in_words(upper: float, limit: str) -> str:
    """A bound beside what is allowed."""
    return f"{upper:+.4f}, {limit}" if upper < inf else f"none, for rows so few or so alike tell nothing, {limit}"


def resampled_means(weights: Floats, differences: Floats, resamples: int, seed: int) -> Floats:
    """Weighted means (resamples) of rows drawn with replacement; weights, differences: (n), n >= 1."""
    weighted = weights * differences
    sums = [
        (weighted[drawn].sum(axis=1), weights[drawn].sum(axis=1)) for drawn in _drawn(len(weights), resamples, seed)
    ]
    above, below = (numpy.concatenate(part) for part in zip(*sums, strict=True))
    return above / below


def _resampled(weights: Floats, differences: Floats, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """(means, their standard errors), each (resamples), of the same draws as `resampled_means`."""
    means, errors = [], []
    for drawn in _drawn(len(weights), resamples, seed):
        weight, difference = weights[drawn], differences[drawn]
        mean = (weight * difference).sum(axis=1) / weight.sum(axis=1)
        means.append(mean)
        errors.append(_error(weight, difference - mean[:, None]))
    return numpy.concatenate(means), numpy.concatenate(errors)


def _error(weights: Floats, centred: Floats) -> Floats:
    """The standard error of a weighted mean, over the last axis, from what the rows are away from it."""
    return numpy.sqrt(((weights * centred) ** 2).sum(axis=-1)) / weights.sum(axis=-1)


def _drawn(rows: int, resamples: int, seed: int) -> Iterator[NDArray[numpy.int64]]:
    """Places of rows drawn with replacement, (some resamples, rows) at a time."""
    generator = numpy.random.default_rng(seed)
    for start in range(0, resamples, AT_ONCE):
        yield generator.integers(rows, size=(min(AT_ONCE, resamples - start), rows))
