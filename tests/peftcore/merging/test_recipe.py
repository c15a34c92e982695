"""Recipes are checked when they are made."""

from typing import Any

import pytest

from peftcore import ConfigError
from peftcore.merging import Recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsify": "random", "density": 0}, "density must be above 0"),
        ({"sparsify": "random", "density": True}, "density must be above 0"),
        ({"sparsify": "largest"}, "sparsify must be one of magnitude, random, row_rank, outliers; got 'largest'"),
        ({"weigh": None}, "weigh must be one of given, slerp, stock"),
        ({"elect": "most"}, "elect must be one of sum, count"),
        ({"normalise": "agreeing"}, "counts elected signs; give elect='sum'"),
        ({"scale": float("inf")}, "scale must be a finite number"),
        ({"sparsify": "row_rank", "density": 0.9, "epsilon": 0.2}, r"at most 1; got 0\.9 and 0\.2; try epsilon=0\.1"),
        ({"sparsify": "row_rank", "density": 0.2, "epsilon": 0.2}, "density - epsilon must be above 0"),
        ({"sparsify": "outliers", "density": 0.9, "gamma": 0.2}, r"from 0 to 1 - density = 0\.1"),
        ({"sparsify": "outliers", "density": 0.9, "gamma": -0.1}, "gamma must be from 0"),
        ({"weigh": "slerp", "sparsify": "random", "density": 0.5}, "computes its own weights of whole changes"),
    ],
    ids=str,
)
def test_of_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)
