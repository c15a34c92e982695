"""A budget is spent on what is worth most for its parameters."""

import itertools

import pytest

from peftcore import ConfigError
from peftcore.train.rank_allocation import allocate_ranks

WORTHS = {"wide": [9.0, 4.0, 1.0], "narrow": [3.0, 2.5, 2.0]}
COSTS = {"wide": 30, "narrow": 10}


def worth(ranks: dict[str, int]) -> float:
    return sum(sum(WORTHS[path][:rank]) for path, rank in ranks.items())


def test_a_budget_that_is_filled_exactly_is_filled_best() -> None:
    filled = 0
    for budget in range(0, 130, 10):
        ranks = allocate_ranks(WORTHS, COSTS, budget, least=0)
        spent = sum(COSTS[path] * rank for path, rank in ranks.items())
        assert spent <= budget
        every = (dict(zip(WORTHS, pair, strict=True)) for pair in itertools.product(range(4), repeat=2))
        best = max(worth(r) for r in every if sum(COSTS[path] * rank for path, rank in r.items()) <= spent)
        ratios = sorted((w / COSTS[path] for path in WORTHS for w in WORTHS[path]), reverse=True)
        taken = sum(ranks.values())
        in_order = sorted((w / COSTS[p] for p in WORTHS for w in WORTHS[p][: ranks[p]]), reverse=True)
        if in_order == ratios[:taken]:  # nothing was passed over for being too dear
            filled += 1
            assert worth(ranks) == best
    assert filled > 8


def test_every_layer_has_the_least_rank_and_none_more_than_its_pieces() -> None:
    worths = {"good": [5.0] * 4, "bad": [0.0] * 4, "small": [0.0]}
    costs = dict.fromkeys(worths, 1)
    assert allocate_ranks(worths, costs, 8, least=2) == {"good": 4, "bad": 3, "small": 1}
    assert allocate_ranks(worths, costs, 99, least=0) == {"good": 4, "bad": 4, "small": 1}
    assert allocate_ranks(worths, costs, 4, least=0) == {"good": 4, "bad": 0, "small": 0}


def test_worths_come_in_any_order_and_ties_go_to_the_earlier_layer() -> None:
    assert allocate_ranks({"a": [1.0, 3.0, 2.0], "b": [2.0, 3.0, 1.0]}, {"a": 1, "b": 1}, 3, least=0) == {
        "a": 2,
        "b": 1,
    }
    assert allocate_ranks({"a": [1.0], "b": [1.0]}, {"a": 1, "b": 1}, 1, least=0) == {"a": 1, "b": 0}


def test_what_is_too_dear_for_the_rest_leaves_it_to_the_cheaper() -> None:
    assert allocate_ranks({"dear": [9.0, 8.0], "cheap": [0.1]}, {"dear": 10, "cheap": 3}, 15, least=0) == {
        "dear": 1,
        "cheap": 1,
    }


def test_a_budget_below_the_least_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"budget of 70 parameters is too small for rank 2 at all 2 layers.* 80"):
        allocate_ranks(WORTHS, COSTS, 70, least=2)


def test_ranks_are_multiples_but_for_a_layers_largest() -> None:
    worths = {"a": [5.0, 5.0, 1.0, 1.0, 1.0], "b": [4.0, 4.0, 4.0, 0.0]}
    costs = {"a": 1, "b": 1}
    found = [allocate_ranks(worths, costs, budget, least=0, multiple=2) for budget in (3, 6, 8, 9)]
    assert found == [{"a": 2, "b": 0}, {"a": 2, "b": 4}, {"a": 4, "b": 4}, {"a": 5, "b": 4}]
    assert allocate_ranks(worths, costs, 4, least=1, multiple=2) == {"a": 2, "b": 2}
    with pytest.raises(ConfigError, match="is too small for rank 2 at all 2 layers, which needs 4"):
        allocate_ranks(worths, costs, 3, least=1, multiple=2)
