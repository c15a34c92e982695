"""Compositions that the command line gives."""

import re

import pytest

from flows.serving.options import parse_compositions
from peftcore.errors import ConfigError


@pytest.mark.parametrize("text", ["mix", '={"a": 1}', 'mix={"a": "b"}', "mix=[1]", "mix={}", 'mix={"a": true}'])
def test_a_composition_that_is_none_is_shown_how(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape('give NAME={"adapter": weight, ...}')):
        parse_compositions([text])


def test_a_composition_is_a_weighted_sum() -> None:
    (one,) = parse_compositions(['mix={"sql": 0.7, "chat": -1}']).values()
    assert [(term.name, term.weight) for term in one.terms()] == [("sql", 0.7), ("chat", -1.0)]
