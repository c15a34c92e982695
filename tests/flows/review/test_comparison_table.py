"""The table in the terminal: best run first, as many columns as fit, and no text of a run that steers the terminal."""

import io
import re

import pytest
from compared_runs import EVIL, run
from rich.console import Console

from flows.review.comparison import Comparison, compare
from flows.review.comparison_table import print_comparison


@pytest.mark.parametrize("width", [60, 200])
def test_the_table_fits_its_terminal(comparison: Comparison, width: int) -> None:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert re.match(r"★ better v0\.1\.2 +2\.500 +8", lines[1]) or width == 60
    assert lines[1].startswith("★ better v0.1.2") and "unfinished" in lines[3]
    assert "unknown: it was killed" in lines


def test_the_table_does_not_steer_the_terminal() -> None:
    out = io.StringIO()
    print_comparison(compare([run(EVIL, 2.0), run("b", 1.0, config={"x": EVIL})]), Console(file=out, width=250))
    assert "\x1b" not in out.getvalue() and "alert(1)" in out.getvalue()


@pytest.mark.parametrize(("width", "there_is_room"), [(30, False), (200, True)])
def test_a_column_for_which_there_is_no_room_is_named(comparison: Comparison, width: int, there_is_room: bool) -> None:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width))
    text = " ".join(out.getvalue().split())
    assert ("2.500" in text) == there_is_room
    assert ("columns that do not fit here, see the page: test loss unknown:" in text) == (not there_is_room)


def test_a_parameters_name_is_shown_as_it_is() -> None:
    out = io.StringIO()
    name = r"options.price_in_\$"
    print_comparison(compare([run("a", 2.0, config={name: 1}), run("b", 3.0, config={name: 2})]), Console(file=out))
    assert r"price_in_\$" in out.getvalue()
