"""Recipes with one coefficient for each change of a layer: sums, averages, SLERP and model stock."""

import itertools
import math
from collections.abc import Sequence

from peftcore.merging.recipe import Recipe
from peftcore.merging.weight_changes import Change

_PARALLEL = 1 - 1e-6
"""|cos θ| above which SLERP becomes linear interpolation, its limit; the division by sin θ would lose all digits."""


def coefficients(changes: Sequence[Change | None], weights: Sequence[float], recipe: Recipe) -> list[float]:
    """Return the coefficients c with ΔW = Σ cᵢΔᵢ at one layer; a change None stands for zero.

    A zero change has no angle: SLERP is then linear interpolation, and model stock takes its cosine as 0. Model stock
    takes a negative mean cosine as 0 too, a case that the paper does not treat.
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
    """Return the cosine of the angle between two changes; None if one of them is zero."""
    if one is None or other is None:
        return None
    lengths = one.inner(one).double().sqrt() * other.inner(other).double().sqrt()
    return float(one.inner(other).double() / lengths) if lengths > 0 else None
