"""Whether one model's losses are really lower than another's: a paired bootstrap over test rows.

A row weighs what it weighs in the test loss (as much as it has supervised tokens, or its own weight), so the mean is
the difference of the two test losses.
"""

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

    weights, ours, theirs: (n), n >= 1.
    """
    differences = ours - theirs
    mean = float(numpy.average(differences, weights=weights))
    if 0.5 ** len(weights) > 1 - confidence:
        return mean, inf
    means = resampled_means(weights, differences, resamples, seed)
    return mean, float(numpy.quantile(means, expanded(confidence, weights)))


def expanded(confidence: float, weights: Floats) -> float:
    """The share of resamples to take for a bound at `confidence`: some more of few rows, which resamples make look
    surer than they are (Hesterberg, 2015, "expanded percentiles"). n is Kish's, of rows that weigh unequally.
    """
    n = max(2.0, float(weights.sum() ** 2 / (weights**2).sum()))
    return NormalDist().cdf((n / (n - 1)) ** 0.5 * float(stdtrit(n - 1, confidence)))


def in_words(upper: float, limit: str) -> str:
    """A bound beside what is allowed."""
    return f"{upper:+.4f}, {limit}" if upper < inf else f"none, for so few rows tell nothing, {limit}"


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
