"""The recipes that are one number for each change of a layer: sums, averages, SLERP and model stock."""

import itertools
import math
from collections.abc import Sequence

from peftcore.merging.changes import Change
from peftcore.merging.recipe import Recipe

_PARALLEL = 1 - 1e-6
"""|cos θ| from which on SLERP is the straight line that it tends to: sin θ would divide by almost nothing."""


def coefficients(changes: Sequence[Change | None], weights: Sequence[float], recipe: Recipe) -> list[float]:
    """c with ΔW = Σ cᵢΔᵢ at one layer; None stands for a change that is zero.

    A zero change has no angle: SLERP is then a straight line, and model stock takes the cosine as 0, as it takes a
    mean below 0, of which its paper says nothing.
    """
    if recipe.weigh == "given":
        share = recipe.scale / (sum(weights) if recipe.normalise == "weights" else 1)
        return [share * w for w in weights]
    cosines = [_cosine(one, other) for one, other in itertools.combinations(changes, 2)]
    if recipe.weigh == "slerp":
        return [recipe.scale * c for c in _slerp(cosines[0], weights[1] / sum(weights))]
    count, mean = len(changes), max(0.0, sum(c or 0.0 for c in cosines) / len(cosines))
    return [recipe.scale * mean / (1 + (count - 1) * mean)] * count


def _slerp(cosine: float | None, t: float) -> tuple[float, float]:
    if cosine is None or abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _cosine(one: Change | None, other: Change | None) -> float | None:
    """None where one of the two is zero."""
    if one is None or other is None:
        return None
    lengths = one.inner(one).double().sqrt() * other.inner(other).double().sqrt()
    return float(one.inner(other).double() / lengths) if lengths > 0 else None
