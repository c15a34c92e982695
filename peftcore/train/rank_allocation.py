"""Ranks within a parameter budget: a knapsack of rank-one components, filled greedily by value per parameter.

Every rank of a layer costs the same number of parameters. A layer's k-th rank adds the value of its k-th best
component, so values decrease within a layer. Greedy choice by value per cost is then optimal for every budget that it
fills exactly, and at most one component away from optimal otherwise (Dantzig 1957).
"""

from collections.abc import Mapping, Sequence

from peftcore.errors import ConfigError


def allocate_ranks(
    worths: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, least: int = 1, multiple: int = 1
) -> dict[str, int]:
    """Return {path: rank} with at most `budget` parameters in all.

    Equal ratios of value to cost go to the earlier layer. A step that exceeds the remaining budget is skipped.

    Args:
        worths: {path: values of a layer's rank-one components}, in any order and one unit for all layers. The number
            of values is the layer's largest rank.
        costs: {path: parameters of one rank}.
        budget: Parameters in all (count).
        least: Lowest rank of a layer, unless its largest rank is lower.
        multiple: Ranks are multiples of this number, or the layer's largest rank.

    Raises:
        ConfigError: The budget is too small for the lowest ranks.
    """
    ranks = {path: min(-(-least // multiple) * multiple, len(pieces)) for path, pieces in worths.items()}
    left = budget - sum(rank * costs[path] for path, rank in ranks.items())
    if left < 0:
        raise ConfigError(
            f"a budget of {budget:,} parameters is too small for rank {max(ranks.values())} at all {len(ranks)} "
            f"layers, which needs {budget - left:,}; raise the budget or adapt fewer layers"
        )
    packs: list[tuple[float, int, str, int]] = []
    for order, path in enumerate(worths):
        best = sorted(worths[path], reverse=True)
        for first in range(ranks[path], len(best), multiple):
            pack = best[first : first + multiple]
            packs.append((-sum(pack) / (len(pack) * costs[path]), order, path, len(pack)))
    full: set[str] = set()  # if a group of ranks exceeds the budget, the layer's later, smaller groups are not tried
    for _, _, path, count in sorted(packs, key=lambda pack: pack[:2]):
        if path in full or count * costs[path] > left:
            full.add(path)
        else:
            ranks[path] += count
            left -= count * costs[path]
    return ranks
