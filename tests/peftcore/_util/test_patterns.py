"""Matching of regular expressions from adapter configurations."""

import pytest

from peftcore._util.patterns import compiled, is_suffix, matched
from peftcore.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q_proj", "layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "layers.0.q_proj", False),  # part of a segment
        ("0.q_proj", "layers.0.q_proj", True),
        ("0.q_proj", "layers.10.q_proj", False),
        ("a.b", "layers.axb", True),  # a dot is any character
        ("[qk]_proj", "layers.0.k_proj", True),
    ],
)
def test_suffixes_are_whole_segments(pattern: str, path: str, expected: bool) -> None:
    assert is_suffix(pattern, path) == expected


def test_a_pattern_between_trusted_ones_stays_one_group() -> None:
    assert matched("a|b", "x.a", before=r"x\.") and matched("a|b", "x.b", before=r"x\.")
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        matched("a)|(b", "a")


@pytest.mark.parametrize("pattern", ["a" * 20_001, "(a{1000}){11}"])
def test_patterns_that_are_too_large_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"the limit is|more than 10,000 copies"):
        compiled(pattern)
