"""Every method learns: with all else frozen, its held-out loss on a tiny real task gets under its own bound."""

import math
from pathlib import Path

import pytest
from digits import CLASSES, base, judge
from digits_rows import ROWS, Row, learn

from peftcore.registry import methods

IN_SLOW = {"LORA", "ADALORA", "IA3", "OFT", "LOHA", "VERA", "PREFIX_TUNING", "PROMPT_TUNING", "XLORA"}
"""Methods, one or two of each kind, that learn in `make slow`; all others learn in `make proof`."""
CASES = [
    pytest.param(row, id=row.name, marks=pytest.mark.slow if row.method in IN_SLOW else pytest.mark.proof)
    for row in ROWS
]


@pytest.mark.filterwarnings("ignore:BEFT")  # it learns there, and cannot be merged
@pytest.mark.parametrize("row", CASES)
def test_learns(row: Row, tmp_path: Path) -> None:
    curve = learn(row, tmp_path)
    assert curve.losses[-1] < row.bound < curve.losses[0] - 1, curve.losses


def test_every_method_has_a_row() -> None:
    own = {name for name, method in methods().items() if method.adapter.__module__.startswith("peftcore.")}
    assert {row.method for row in ROWS} == own


def test_a_bound_is_below_knowing_nothing() -> None:
    assert max(row.bound for row in ROWS) < math.log(CLASSES) - 0.1


@pytest.mark.slow
def test_the_base_reads_upright_digits_and_not_transposed_ones() -> None:
    assert judge(base(), "upright")[0] < 1
    assert judge(base(), "transposed")[0] > 4
