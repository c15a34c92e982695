"""Ranks for a budget of parameters: the knapsack of rank-one pieces, filled by worth per parameter.

A layer's k-th rank costs as many parameters whatever k is, and brings what its k-th best piece is worth. Worths fall
within a layer, so taking the best ratio of worth to cost first is optimal for every budget that it fills exactly, and
at most one piece away from it otherwise (Dantzig 1957).
"""

from collections.abc import Mapping, Sequence

from peftcore.errors import ConfigError


def allocate_ranks(
    worths: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, least: int = 1, multiple: int = 1
) -> dict[str, int]:
    """{path: rank} of at most `budget` parameters.

    worths: of each rank-one piece a layer could have, in any unit that is the same for all layers and in any order;
    their count is the layer's largest rank. costs: parameters of one rank. least: rank that every layer has, if its
    largest is not below. multiple: of which every rank is one, or the layer's largest, so that pieces go in packs of so
    many. Equal ratios go to the earlier layer. A pack too dear for what is left is passed over.
    Raises ConfigError where the budget does not pay for the least ranks.
    """
    ranks = {path: min(-(-least // multiple) * multiple, len(pieces)) for path, pieces in worths.items()}
    left = budget - sum(rank * costs[path] for path, rank in ranks.items())
    if left < 0:
        raise ConfigError(
            f"a budget of {budget:,} parameters does not pay for rank {max(ranks.values())} at all {len(ranks)} "
            f"layers, which takes {budget - left:,}; raise the budget or adapt fewer layers"
        )
    packs: list[tuple[float, int, str, int]] = []
    for order, path in enumerate(worths):
        best = sorted(worths[path], reverse=True)
        for first in range(ranks[path], len(best), multiple):
            pack = best[first : first + multiple]
            packs.append((-sum(pack) / (len(pack) * costs[path]), order, path, len(pack)))
    full: set[str] = set()  # a layer's last pack may be smaller, and does not come before the one that was too dear
    for _, _, path, count in sorted(packs, key=lambda pack: pack[:2]):
        if path in full or count * costs[path] > left:
            full.add(path)
        else:
            ranks[path] += count
            left -= count * costs[path]
    return ranks
