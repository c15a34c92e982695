"""Routers choose by name, tag, rule, share and similarity."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.errors import RoutingError
from peftcore.routing import ByName, ByRule, ByTag, Centroids, FirstOf, Request, Shares


def letters(texts: Any) -> Tensor:
    """How often each letter stands in a text (n, 26)."""
    return torch.tensor([[float(text.count(chr(97 + i))) for i in range(26)] for text in texts])


def test_names_tags_rules_and_the_first_opinion() -> None:
    router = FirstOf(
        [
            ByName(["sql", "chat"]),
            ByTag({"gold": {"sql": 0.5, "chat": 0.5}, "silver": "chat"}),
            ByRule([(lambda request: len(request.text) > 10, "long")]),
        ],
        fallback="rest",
    )
    for request, expected in (
        (Request(adapter="sql", tags=frozenset({"silver"})), "sql"),
        (Request(adapter="unknown", tags=frozenset({"silver", "gold"})), {"sql": 0.5, "chat": 0.5}),
        (Request(tags=frozenset({"silver"})), "chat"),
        (Request(text="a text that is long"), "long"),
        (Request(), "rest"),
    ):
        assert router.route(request) == expected
    assert FirstOf([ByName([])]).route(Request()) is None


def test_shares_are_sticky_and_as_large_as_they_say() -> None:
    shares = Shares({"new": 1, "old": 3})
    found = {key: shares.route(Request(key=str(key))) for key in range(4000)}
    assert found == {key: shares.route(Request(key=str(key))) for key in range(4000)}
    assert Counter(found.values())["new"] == pytest.approx(1000, abs=4 * (4000 * 0.25 * 0.75) ** 0.5)
    wider = Shares({"new": 2, "old": 2})
    assert all(wider.route(Request(key=str(key))) == "new" for key, name in found.items() if name == "new")
    other = Shares({"new": 1, "old": 3}, salt="another week")
    assert sum(other.route(Request(key=str(key))) != name for key, name in found.items()) > 1000
    assert Shares({None: 1.0}).route(Request()) == "__base__"
    for wrong in ({}, {"a": -1.0, "b": 2.0}, {"a": 0.0}):
        with pytest.raises(RoutingError, match="give weights of at least 0, and one above"):
            Shares(wrong)  # type: ignore[arg-type]


def test_a_text_goes_to_the_adapter_whose_texts_it_resembles() -> None:
    router = Centroids.of(letters, {"a": ["aaa b", "aa"], "z": ["zz y", "zzzz"]}, at_least=0.5)
    assert router.route(Request(text="aab")) == "a" and router.route(Request(text="yzz")) == "z"
    assert router.route(Request(text="mnop")) is None
    expected = F.normalize(F.normalize(letters(["aaa b", "aa"]), dim=-1).mean(0), dim=-1)
    torch.testing.assert_close(router.similarities(["aab"])[0, 0], F.normalize(letters(["aab"]))[0] @ expected)
    with pytest.raises(RoutingError, match=r"\['a'\] have no texts"):
        Centroids.of(letters, {"a": []})
