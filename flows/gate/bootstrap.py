"""Paired bootstrap over test rows: are one model's losses lower than another model's, beyond chance?

A row's weight is its weight in the test loss (its number of supervised tokens, or its own weight), so the weighted mean
is the difference of the two test losses. Other metrics are compared in the same way, with rows of equal weight.
"""

from collections.abc import Iterator
from math import inf
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy
from numpy.typing import NDArray
from scipy.special import stdtrit

from flows.errors import GateError
from flows.gate.rows import row_values, row_weights
from flows.params.gate import Direction

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 500
"""Resamples held in memory at a time."""

ROUNDING = 1e-12
"""Relative size below which a difference counts as zero."""

Floats = NDArray[numpy.float64]


class Paired(NamedTuple):
    """Values of the n rows that two tables share; lower values are better."""

    weights: Floats
    ours: Floats
    theirs: Floats
    ids: list[str]


def paired_losses(ours: "pyarrow.Table", theirs: "pyarrow.Table") -> Paired:
    """Return weights and losses of the rows that both tables have, matched by id."""
    return paired_values(ours, theirs, "loss", "lower")


def paired_values(ours: "pyarrow.Table", theirs: "pyarrow.Table", metric: str, direction: Direction) -> Paired:
    """Return weights and values of the rows that have a value in both tables, matched by id.

    Args:
        ours: the candidate's table.
        theirs: the champion's table.
        metric: a figure or the name of a scorer; a table without it shares no row.
        direction: the better direction; values that are better if they are higher are negated.
    """
    left, right = _by_id(ours, metric), _by_id(theirs, metric)
    shared = sorted(name for name in left.keys() & right.keys() if left[name][0] > 0)
    weights = numpy.array([left[name][0] for name in shared], dtype=numpy.float64)
    sign = 1.0 if direction == "lower" else -1.0
    values = [sign * numpy.array([side[name][1] for name in shared], dtype=float) for side in (left, right)]
    return Paired(weights, values[0], values[1], shared)


def _by_id(table: "pyarrow.Table", metric: str) -> dict[str, tuple[float, float]]:
    ids, values = table.column("id").to_pylist(), row_values(table, metric)
    if len(set(ids)) != len(ids):
        raise GateError("test rows share an id, so they cannot be paired; prepare the data again")
    if values is None:
        return {}
    rows = zip(ids, row_weights(table, metric), values, strict=True)
    return {name: (weight, value) for name, weight, value in rows if value is not None}


def paired_bootstrap(
    weights: Floats, ours: Floats, theirs: Floats, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Return the mean of ours minus theirs, and its one-sided upper bound.

    The bound's distance from the mean is the largest of three distances: that of the resamples' upper percentile; that
    of their lower percentile, because the side without outliers says little about the other; and that of the
    studentized bootstrap's bound (Efron and Tibshirani, 1993, chapter 12.5), which is largest if a few rows are much
    worse.

    Args:
        weights: (n), n >= 1, the rows' weights.
        ours: (n), losses in nats per token.
        theirs: (n), losses in nats per token.
        confidence: one-sided confidence of the bound.
        resamples: number of bootstrap resamples.
        seed: seed of the resamples.

    Returns:
        (mean, upper). The bound is infinite if the rows are so few that all of them are better by chance with a
        probability above 1 - confidence.
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
    if error <= ROUNDING * float(abs(differences).max()):  # all rows have the same difference
        return mean, mean + distance
    # a resample whose rows have the same difference has no standard error: its deviation is infinite, or 0 at the mean
    far = numpy.where(abs(means) > ROUNDING * error, numpy.copysign(inf, means), 0.0)
    deviations = numpy.divide(means, errors, out=far, where=errors > ROUNDING * error)
    lowest = float(numpy.quantile(deviations, 1 - confidence, method="lower"))  # infinities cannot be interpolated
    return mean, mean + max(distance, -lowest * float(error))


def expanded(confidence: float, weights: Floats) -> float:
    """Return the percentile of the resamples for a bound at `confidence` (Hesterberg, 2015, "expanded percentiles").

    The percentile is larger for few rows, because resamples of few rows vary too little. Rows with unequal weights
    count as n equal rows, where n loses the same part of its variance by centring on the sample's own mean.
    """
    parts = weights / weights.sum()
    lost = 2 * (parts**3).sum() / (parts**2).sum() - (parts**2).sum()
    n = max(2.0, 1 / float(lost))
    return NormalDist().cdf((n / (n - 1)) ** 0.5 * float(stdtrit(n - 1, confidence)))


def bound_in_words(upper: float, limit: str) -> str:
    """Return a bound and its limit in words."""
    return f"{upper:+.4f}, {limit}" if upper < inf else f"none, because the rows are too few or too similar, {limit}"


def resampled_means(weights: Floats, differences: Floats, resamples: int, seed: int) -> Floats:
    """Return weighted means, (resamples), of rows drawn with replacement. weights, differences: (n), n >= 1."""
    weighted = weights * differences
    sums = [
        (weighted[drawn].sum(axis=1), weights[drawn].sum(axis=1)) for drawn in _drawn(len(weights), resamples, seed)
    ]
    above, below = (numpy.concatenate(part) for part in zip(*sums, strict=True))
    return above / below


def _resampled(weights: Floats, differences: Floats, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """Return the weighted means and their standard errors, (resamples,) each, with the draws of `resampled_means`."""
    means, errors = [], []
    for drawn in _drawn(len(weights), resamples, seed):
        weight, difference = weights[drawn], differences[drawn]
        mean = (weight * difference).sum(axis=1) / weight.sum(axis=1)
        means.append(mean)
        errors.append(_error(weight, difference - mean[:, None]))
    return numpy.concatenate(means), numpy.concatenate(errors)


def _error(weights: Floats, centred: Floats) -> Floats:
    """Return the standard error of a weighted mean over the last axis, from the rows' deviations."""
    return numpy.sqrt(((weights * centred) ** 2).sum(axis=-1)) / weights.sum(axis=-1)


def _drawn(rows: int, resamples: int, seed: int) -> Iterator[NDArray[numpy.int64]]:
    """Yield indices of rows drawn with replacement, (at most AT_ONCE resamples, rows) at a time."""
    generator = numpy.random.default_rng(seed)
    for start in range(0, resamples, AT_ONCE):
        yield generator.integers(rows, size=(min(AT_ONCE, resamples - start), rows))
