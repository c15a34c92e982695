"""Ranks for a budget of parameters: the knapsack of rank-one pieces, filled by worth per parameter.

A layer's k-th rank costs as many parameters whatever k is, and brings what its k-th best piece is worth. Worths fall
within a layer, so taking the best ratio of worth to cost first is optimal for every budget that it fills exactly, and
at most one piece away from it otherwise (Dantzig 1957).
"""

from collections.abc import Mapping, Sequence

from peftcore.errors import ConfigError


def allocate_ranks(
    worths: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, least: int = 1
) -> dict[str, int]:
    """{path: rank} of at most `budget` parameters.

    worths: of each rank-one piece a layer could have, in any unit that is the same for all layers and in any order;
    their count is the layer's largest rank. costs: parameters of one rank. least: rank that every layer has, if its
    largest is not below. Equal ratios go to the earlier layer. A piece too dear for what is left is passed over.
    Raises ConfigError where the budget does not pay for the least ranks.
    """
    ranks = {path: min(least, len(pieces)) for path, pieces in worths.items()}
    left = budget - sum(rank * costs[path] for path, rank in ranks.items())
    if left < 0:
        raise ConfigError(
            f"a budget of {budget:,} parameters does not pay for rank {least} at all {len(ranks)} layers, which takes "
            f"{budget - left:,}; raise the budget or adapt fewer layers"
        )
    pieces = [
        (-worth / costs[path], order, path)
        for order, path in enumerate(worths)
        for worth in sorted(worths[path], reverse=True)[ranks[path] :]
    ]
    for _, _, path in sorted(pieces, key=lambda piece: piece[:2]):
        if costs[path] <= left:
            ranks[path] += 1
            left -= costs[path]
    return ranks
