"""Paired bootstrap within each slice of the test rows, to find slices where the candidate is worse than the champion.

Of many slices, one looks bad by chance. Holm's correction keeps the probability of refusing a candidate that is in no
slice worse than allowed below 1 - confidence. Small slices are tested together.
"""

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy

from flows.gate.bootstrap import paired_losses, resampled_means
from flows.params import Slices

if TYPE_CHECKING:
    import pyarrow

SMALL = "the small slices together"


class SliceDifference(NamedTuple):
    """Candidate minus champion in one slice."""

    name: str
    rows: int
    mean: float
    """Weighted mean of the difference in nats per token."""
    p: float
    """p-value of the hypothesis that the slice is no worse than allowed."""
    is_worse: bool


def slice_differences(
    ours: "pyarrow.Table", theirs: "pyarrow.Table", rule: Slices, resamples: int, seed: int
) -> list[SliceDifference]:
    """Return the differences of all slices that both versions were evaluated on, by name.

    Args:
        ours: the candidate's table, as for `paired_losses`, with a column `slice`.
        theirs: the champion's table.
        rule: the limit, the confidence, and the number of rows below which slices are tested together.
        resamples: number of bootstrap resamples, at least.
        seed: seed of the resamples.
    """
    limit = rule.max_loss_regression or 0.0
    paired = paired_losses(ours, theirs)
    slices = ours.column("slice").to_pylist() if "slice" in ours.column_names else [""] * len(ours)
    of_row = dict(zip(ours.column("id").to_pylist(), slices, strict=True))
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(paired.ids):
        members[of_row[name] or "all rows"].append(index)
    small = [name for name, places in members.items() if len(places) < rule.min_rows]
    if together := [index for name in small for index in members.pop(name)]:
        members[SMALL] = together
    level = 1 - rule.confidence
    resamples = max(resamples, math.ceil(10 * len(members) / level))  # or the smallest possible p would be too large
    differences: list[tuple[str, int, float, float]] = []
    for number, (name, places) in enumerate(sorted(members.items())):
        weights, losses = paired.weights[places], (paired.ours - paired.theirs)[places]
        means = resampled_means(weights, losses, resamples, seed + number)
        p = float((1 + (means <= limit).sum()) / (1 + resamples))
        differences.append((name, len(places), float(numpy.average(losses, weights=weights)), p))
    worse = _holm([p for *_, p in differences], level)
    return [SliceDifference(*one, is_worse) for one, is_worse in zip(differences, worse, strict=True)]


def _holm(p_values: list[float], level: float) -> list[bool]:
    """Return the hypotheses to reject, with a probability of any false rejection of at most `level` (Holm, 1979)."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected
