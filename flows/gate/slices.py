"""Where a candidate is worse than the champion: the paired bootstrap within each slice of the test rows.

A slice is worse if the data say so against the chance that, of many slices, one looks bad by itself: Holm's correction
holds the probability of refusing anything at all by chance, where no slice is truly worse than allowed, below
1 - confidence. Slices too small to tell are looked at together.
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
    """Nats per token."""
    p: float
    """Of a mean as far above what is allowed, if the truth were what is allowed."""
    is_worse: bool


def slice_differences(
    ours: "pyarrow.Table", theirs: "pyarrow.Table", rule: Slices, resamples: int, seed: int
) -> list[SliceDifference]:
    """Each slice of the candidate's rows that the champion was measured on too, by name; tables as `paired_losses` has
    them, ours with `slice`. rule: with a limit; its `min_rows` decides which are looked at together.
    """
    limit = rule.max_loss_regression or 0.0
    paired = paired_losses(ours, theirs)
    slices = ours.column("slice").to_pylist() if "slice" in ours.column_names else [""] * len(ours)
    of_row = dict(zip(ours.column("id").to_pylist(), slices, strict=True))
    members: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(paired.ids):
        members[of_row[name] or "all rows"].append(place)
    small = [name for name, places in members.items() if len(places) < rule.min_rows]
    if together := [place for name in small for place in members.pop(name)]:
        members[SMALL] = together
    level = 1 - rule.confidence
    resamples = max(resamples, math.ceil(10 * len(members) / level))  # or the smallest p there is would be too large
    found: list[tuple[str, int, float, float]] = []
    for number, (name, places) in enumerate(sorted(members.items())):
        weights, differences = paired.weights[places], (paired.ours - paired.theirs)[places]
        means = resampled_means(weights, differences, resamples, seed + number)
        p = float((1 + (means <= limit).sum()) / (1 + resamples))
        found.append((name, len(places), float(numpy.average(differences, weights=weights)), p))
    worse = _holm([p for *_, p in found], level)
    return [SliceDifference(*one, is_worse) for one, is_worse in zip(found, worse, strict=True)]


def _holm(p_values: list[float], level: float) -> list[bool]:
    """Which hypotheses are rejected, the probability of any false rejection being at most `level` (Holm, 1979)."""
    rejected = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] > level / (len(p_values) - rank):
            break
        rejected[place] = True
    return rejected
