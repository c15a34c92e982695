"""Paired bootstrap within each slice of the test rows, to find slices where the candidate is worse than the champion.

Of many slices, one looks bad by chance. Holm's correction keeps the probability of refusing a candidate that is in no
slice worse than allowed below 1 - confidence. Small slices are tested together.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy

from flows.gate.bootstrap import Floats, paired_values, resampled_means
from flows.params import Slices
from flows.params.gate import Direction

if TYPE_CHECKING:
    import pyarrow

SMALL = "the small slices together"


class SliceDifference(NamedTuple):
    """Candidate minus champion in one slice."""

    name: str
    rows: int
    mean: float
    """Weighted mean of the difference; of the loss in nats per token."""
    p: float
    """p-value of the hypothesis that the slice is no worse than allowed."""
    is_worse: bool
    metric: str = "loss"


class Compared(NamedTuple):
    """A metric to compare in each slice: the tables of candidate and champion, and the largest allowed regression."""

    metric: str
    direction: Direction
    limit: float
    ours: "pyarrow.Table"
    theirs: "pyarrow.Table"


def slice_differences(
    ours: "pyarrow.Table", theirs: "pyarrow.Table", rule: Slices, resamples: int, seed: int
) -> list[SliceDifference]:
    """Return the differences of the loss in all slices that both versions were evaluated on, by name.

    Args:
        ours: the candidate's table, as for `paired_losses`, with a column `slice`.
        theirs: the champion's table.
        rule: the limit, the confidence, and the number of rows below which slices are tested together.
        resamples: number of bootstrap resamples, at least.
        seed: seed of the resamples.
    """
    loss = Compared("loss", "lower", rule.max_loss_regression or 0.0, ours, theirs)
    return metric_differences([loss], rule, resamples, seed)


def metric_differences(metrics: Sequence[Compared], rule: Slices, resamples: int, seed: int) -> list[SliceDifference]:
    """Return the differences in each slice for several metrics; Holm's correction is over all of them together.

    The arguments are those of `slice_differences`, with the tables and the limit of each metric.
    """
    tests = [(compared, *members) for compared in metrics for members in _members(compared, rule.min_rows)]
    level = 1 - rule.confidence
    resamples = max(resamples, math.ceil(10 * len(tests) / level))  # or the smallest possible p would be too large
    differences: list[tuple[str, int, float, float]] = []
    for number, (compared, name, weights, regressions) in enumerate(tests):
        means = resampled_means(weights, regressions, resamples, seed + number)
        p = float((1 + (means <= compared.limit).sum()) / (1 + resamples))
        mean = float(numpy.average(regressions, weights=weights))
        differences.append((name, len(weights), mean if compared.direction == "lower" else -mean, p))
    worse = _holm([p for *_, p in differences], level)
    return [
        SliceDifference(*one, is_worse, test[0].metric)
        for one, is_worse, test in zip(differences, worse, tests, strict=True)
    ]


def _members(compared: Compared, min_rows: int) -> Iterator[tuple[str, Floats, Floats]]:
    """Yield (name, weights of the rows, candidate minus champion with lower values better) of each slice, by name."""
    ours = compared.ours
    paired = paired_values(ours, compared.theirs, compared.metric, compared.direction)
    slices = ours.column("slice").to_pylist() if "slice" in ours.column_names else [""] * len(ours)
    of_row = dict(zip(ours.column("id").to_pylist(), slices, strict=True))
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(paired.ids):
        members[of_row[name] or "all rows"].append(index)
    small = [name for name, places in members.items() if len(places) < min_rows]
    if together := [index for name in small for index in members.pop(name)]:
        members[SMALL] = together
    for name, places in sorted(members.items()):
        yield name, paired.weights[places], (paired.ours - paired.theirs)[places]


def _holm(p_values: list[float], level: float) -> list[bool]:
    """Return the hypotheses to reject, with a probability of any false rejection of at most `level` (Holm, 1979)."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected
