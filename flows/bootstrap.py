"""Whether one model's losses are really lower than another's: a paired bootstrap over test rows.

A row weighs as much as it has supervised tokens, so the mean is the difference of the two test losses.
"""

from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from flows.errors import GateError

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 500
"""Resamples held in memory together."""

Floats = NDArray[numpy.float64]


def paired_losses(ours: "pyarrow.Table", theirs: "pyarrow.Table") -> tuple[Floats, Floats, Floats]:
    """Tokens, our losses, their losses of the rows (n) that both tables have, matched by id."""
    left, right = _by_id(ours), _by_id(theirs)
    shared = sorted(left.keys() & right.keys())
    tokens = numpy.array([left[name][0] for name in shared], dtype=numpy.float64)
    ours_there, theirs_there = (numpy.array([side[name][1] for name in shared], dtype=float) for side in (left, right))
    return tokens, ours_there, theirs_there


def _by_id(table: "pyarrow.Table") -> dict[str, tuple[float, float]]:
    ids, tokens, losses = (table.column(name).to_pylist() for name in ("id", "tokens", "adapter_loss"))
    rows = dict(zip(ids, zip(tokens, losses, strict=True), strict=True))
    if len(rows) != len(ids):
        raise GateError("test rows share an id, so they cannot be paired; prepare the data again")
    return rows


def paired_bootstrap(
    tokens: Floats, ours: Floats, theirs: Floats, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """(mean, upper) of ours minus theirs in nats per token; upper: its one-sided bound at `confidence`.

    tokens, ours, theirs: (n), n >= 1.
    """
    weighted = tokens * (ours - theirs)
    generator = numpy.random.default_rng(seed)
    means = numpy.empty(resamples)
    for start in range(0, resamples, AT_ONCE):
        size = (min(AT_ONCE, resamples - start), len(tokens))
        drawn = generator.integers(len(tokens), size=size)
        means[start : start + AT_ONCE] = weighted[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    return float(weighted.sum() / tokens.sum()), float(numpy.quantile(means, confidence))
