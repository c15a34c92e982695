"""Charts of a comparison: which there are, what they draw, and how many runs they tell apart."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
from compared_runs import EVIL, run

from flows.review.comparison import Comparison, compare
from flows.review.comparison_charts import (
    AXES,
    COLORS,
    DASHES,
    POINTS,
    _places,
    color,
    curves,
    dash,
    parallel_coordinates,
    ranking_values,
    scatters,
    short,
    varied,
)


def differing(count: int, **values: Any) -> Comparison:
    """Runs with losses 2.0, 2.1, ... and these lists of values by key of the configuration."""
    keys = {key.replace("__", "."): each for key, each in values.items()}
    return compare(
        [run(f"run{n}", 2 + n / 10, config={key: each[n] for key, each in keys.items()}) for n in range(count)]
    )


def group(chart: str, name: str) -> str:
    """The part of a chart that belongs to a run, by its id."""
    (found,) = re.findall(rf'<g id="{name}">(.*?)</g>', chart, re.DOTALL)
    return found


def test_thirty_two_runs_have_looks_of_their_own() -> None:
    looks = {(color(place), str(dash(place))) for place in range(len(COLORS) * len(DASHES))}
    assert len(looks) == 32
    assert (color(32), dash(32)) == (color(0), dash(0)), "a further one shares a look"


def test_a_curve_is_drawn_for_each_run_that_has_it(comparison: Comparison) -> None:
    chart = curves(comparison, "validation")
    assert chart is not None and {f"run-{n}-validation" for n in range(3)} <= set(re.findall(r'id="([^"]+)"', chart))
    bare = compare([replace(one, history={}) for one in comparison.runs])
    assert curves(bare, "training") is None
    part = compare([comparison.runs[0], replace(comparison.runs[1], history={})])
    chart = curves(part, "training")
    assert chart is not None and "run-0-training" in chart and "run-1-training" not in chart


@pytest.mark.parametrize("steps", [POINTS, POINTS + 1, 2 * POINTS - 1, 4 * POINTS])
def test_a_long_curve_is_thinned_evenly(steps: int) -> None:
    """The points that are left go up and down, so the drawing library needs every one of them."""
    every = -(-steps // POINTS)
    points = [(step, float(step // every % 2)) for step in range(steps)]
    chart = curves(compare([replace(run("a", 2.0), history={"validation_loss": points})]), "validation")
    assert chart is not None
    (path,) = re.findall(r' d="([^"]+)"', group(chart, "run-0-validation"))
    drawn = {tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path)}
    assert len(drawn) == -(-steps // every) <= POINTS
    across = sorted(x for x, _ in drawn)
    gaps = [right - left for left, right in itertools.pairwise(across)]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-3)


def test_figures_are_drawn_against_parameters_where_two_runs_can_be_compared() -> None:
    two = differing(2, method__r=[4, 8])
    assert parallel_coordinates(two) is not None and len(scatters(two)) == 1
    same = differing(2, method__r=[4, 4])
    assert parallel_coordinates(same) is None and scatters(same) == []
    alone = compare([run("a", 2.0, config={"x": 1}), run("b", None, config={"x": 2})])
    assert parallel_coordinates(alone) is None and scatters(alone) == []
    unknown = compare([run("a", None, config={"x": 1}), run("b", None, config={"x": 2})])
    assert ranking_values(unknown) == [None, None]
    assert parallel_coordinates(unknown) is None and scatters(unknown) == []


def test_only_parameters_that_can_affect_the_result_have_an_axis_and_not_too_many() -> None:
    names = {"project__name": ["a", "b"], "tracking__mode": ["x", "y"], "gate__stage": ["x", "y"]}
    many = {f"train__p{n}": [n, n + 1] for n in range(AXES + 2)}
    assert varied(differing(2, **names)) == []
    assert varied(differing(2, **names, **many)) == [f"train.p{n}" for n in range(AXES)]
    assert len(scatters(differing(2, **many))) == AXES


def test_a_key_is_labelled_by_its_last_part_unless_another_has_the_same() -> None:
    assert short(["train.learning_rate", "method.r", "data.kind"]) == ["learning_rate", "r", "kind"]
    assert short(["evaluate.rows", "merge.rows", "method.r"]) == ["evaluate.rows", "merge.rows", "r"]
    (cut,) = short(["x" * 40])
    assert len(cut) == 28 and cut.endswith("…")


def test_on_an_axis_the_lowest_loss_is_on_top_and_decades_are_evenly_spaced() -> None:
    heights, ticks = _places([2.0, 3.0, 2.25], flipped=True, form="{:.3f}")
    assert heights == [1.0, 0.0, 0.75]
    assert ticks == [(1.0, "2.000"), (0.0, "3.000")]
    heights, _ = _places([1e-4, 1e-2, 1e-3])
    assert heights == pytest.approx([0.0, 1.0, 0.5])
    heights, _ = _places([-1.0, 0.0, 3.0])
    assert heights == pytest.approx([0.0, 0.25, 1.0]), "no logarithm of a number below zero"
    assert _places([5, 5])[0] == [0.5, 0.5]


def test_values_that_are_no_numbers_are_spread_evenly_in_the_order_of_the_runs() -> None:
    heights, ticks = _places(["nf4", None, "nf4", ["q_proj"]])
    assert heights == [0.0, 0.5, 0.0, 1.0]
    assert [text for _, text in ticks] == ["nf4", "–", '["q_proj"]']


def test_the_champion_is_a_star_and_text_of_a_run_is_text() -> None:
    there = differing(2, x=[EVIL, "plain"])
    (chart,) = scatters(compare([replace(there.runs[0], is_champion=True), there.runs[1]]))
    star, circle = (re.findall(r' d="([^"]+)"', group(chart, f"run-{place}-scatter-0"))[0] for place in (0, 1))
    assert "C " in circle and "C " not in star, "a circle is made of curves, a star of lines"
    assert "<script" not in chart and "alert" in chart
    drawn = parallel_coordinates(there)
    assert drawn is not None and "<script" not in drawn
