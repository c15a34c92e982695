"""What compositions say of themselves, before any layer: names, chains, terms, equality, and what they refuse."""

import math
from typing import Any, cast

import pytest
import torch

from peftcore.composition import BASE, Average, Gate, Only, Parallel, Split, Stack, Weighted
from peftcore.composition.algebra import composition
from peftcore.errors import RoutingError


def weights(one: object) -> list[tuple[str, float]]:
    return [(term.name, term.weight) for term in composition(one).terms()]  # type: ignore[arg-type]


def test_sums_and_multiples_of_names() -> None:
    mix = 0.7 * Only("sql") + 0.3 * Only("chat") - 0.2 * Only("toxic")
    assert weights(mix) == [("sql", 0.7), ("chat", 0.3), ("toxic", -0.2)]
    assert mix == Weighted({"sql": 0.7, "chat": 0.3, "toxic": -0.2}) and hash(mix) == hash(0.5 * (mix * 2))


def test_weights_multiply_down_a_nest() -> None:
    nest = Weighted([(Average("a", Stack("b", "c")), 0.5), ("a", 1.0)])
    assert weights(nest) == [("a", 0.25), ("b", 0.25), ("c", 0.25), ("a", 1.0)]
    assert weights(Parallel("a", {"b": -2.0})) == [("a", 1.0), ("b", -2.0)]


def test_a_mean_of_one_thing_twice_is_that_thing() -> None:
    assert sum(weight for _, weight in weights(Average("a", "a"))) == 1.0


@pytest.mark.parametrize("base", [None, "__base__", Stack(), BASE])
def test_the_base_has_many_names(base: object) -> None:
    assert composition(base) == BASE and composition(base).chain() == ()  # type: ignore[arg-type]


def test_chains() -> None:
    assert Stack("a", Stack("b", None), "c").chain() == ("a", "b", "c")
    assert Stack("a", "a").chain() is None  # twice on top of itself is no chain that `set_adapter` takes
    assert Stack("a", {"b": 0.5}).chain() is None and Only("a").chain() == ("a",)


def test_splits_meet_inside_of_splits() -> None:
    outer = Split((Split(a=2, b=...), 5), ("c", ...))
    found = [(term.name, term.start, term.stop) for term in outer.terms()]
    assert found == [("a", 0, 2), ("b", 2, 5), ("c", 5, math.inf)]
    assert list(Split(("a", 2), (Split(b=2), ...)).terms())[1:] == []  # b's two tokens are a's


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: composition(3), "3 is no composition of adapters; give a name"),  # type: ignore[arg-type]
        (lambda: Weighted({"a": math.nan}), "the weight of 'a' is nan"),
        (lambda: Weighted(cast(Any, {"a": "b"})), "the weight of 'a' is 'b'; give a finite number"),
        (lambda: Average(), "give at least one adapter"),
        (lambda: Split(*cast(Any, ("a", "b"))), r"'a' has no number of tokens; give pairs, such as \('sql', 64\)"),
        (lambda: Split(a=0), "has 0 tokens; give at least 1, or ... for the rest"),
        (lambda: Split(a=..., b=3), "comes after `...`, which took the rest"),
        (lambda: Gate((), lambda path, adapters, x: x), "give at least one adapter"),
        (lambda: Gate(("a", "b"), lambda path, adapters, x: x, top_k=3), "top_k must be from 1 to 2, got 3"),
    ],
)
def test_what_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(RoutingError, match=said):
        make()  # type: ignore[operator]


def test_top_k_keeps_the_largest_and_their_sum() -> None:
    given = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    gate = Gate(("a", "b", "c"), lambda path, adapters, x: given, top_k=2)
    found = gate.weights("layer", dict.fromkeys("abc"), torch.zeros(2, 4), (2,))
    torch.testing.assert_close(found[0], torch.tensor([0.625, 0.375, 0.0]))
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_a_token_whose_weights_are_all_zero_gets_no_adapter() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.3, 0.2]], requires_grad=True)
    gate = Gate(("a", "b", "c"), lambda path, adapters, x: weights, top_k=2)
    found = gate.weights("layer", dict.fromkeys("abc"), torch.zeros(2, 4), (2,))
    torch.testing.assert_close(found.detach(), torch.tensor([[0.0, 0.0, 0.0], [0.625, 0.375, 0.0]]))
    (gradient,) = torch.autograd.grad(found.square().sum(), weights)
    assert gradient.isfinite().all()


def test_a_gate_gives_nothing_to_members_that_a_layer_has_not() -> None:
    gate = Gate(("a", "b"), lambda path, adapters, x: torch.ones(*x.shape[:-1], len(adapters)))
    assert gate.weights("layer", {"b": None}, torch.zeros(3, 4), (3,)).tolist() == [[0.0, 1.0]] * 3
    wrong = Gate(("a", "b"), lambda path, adapters, x: torch.ones(1))
    with pytest.raises(RoutingError, match=r"weights \(1,\) at layer for x \(3, 4\) and 2 adapters; return \(3, 2\)"):
        wrong.weights("layer", {"a": None, "b": None}, torch.zeros(3, 4), (3,))
