"""Runs beside each other: order, differences, best figures; the table; the page, which nothing in a run can change."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.review.comparison import Comparison, compare
from flows.review.comparison_page import write_comparison
from flows.review.comparison_table import print_comparison
from flows.review.run import Run, flat, joined, series

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x$\x1b[31m"


def run(name: str, loss: float | None, **given: Any) -> Run:
    config = {"train.learning_rate": 1e-3, "method.r": 8, "method.name": "lora", **given.pop("config", {})}
    history = {"loss": [(step, 3.0 / step) for step in range(1, 9)], "validation_loss": [(4, 2.9), (8, 2.8)]}
    summary = {} if loss is None else {"adapter.loss": loss}
    return Run(id=name, name=name, where=f"/runs/{name}", config=config, summary=summary, history=history, **given)


@pytest.fixture
def comparison() -> Comparison:
    sample = {"prompt": "p", "reference": "r", "base": "b", "adapter": "good"}
    return compare(
        [
            run("worse", 2.9, config={"method.r": 4}, samples=({**sample, "adapter": "bad"},)),
            run("unknown", None, state="unfinished", warnings=("it was killed",)),
            run("better", 2.5, samples=(sample, {**sample, "prompt": "q"}), is_champion=True, version="v0.1.2"),
        ]
    )


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def number(self, tag: str) -> int:
        return [name for name, _ in self.tags].count(tag)


def page_of(comparison: Comparison, folder: Path) -> Page:
    return Page(write_comparison(comparison, folder / "comparison.html", "runs").read_text())


def test_the_best_comes_first_and_a_run_without_figures_last(comparison: Comparison) -> None:
    assert [run.name for run in comparison.runs] == ["better", "worse", "unknown"]
    assert comparison.judged_by is not None and comparison.judged_by.label == "test loss"
    loss = comparison.figures[0]
    assert loss.values == (2.5, 2.9, None) and loss.best == {0} and loss.shown(2) == "–"


def test_without_test_losses_the_validation_loss_decides() -> None:
    found = compare([run("a", None), Run("b", "b", "b", summary={"best_validation_loss": 1.5})])
    assert [one.name for one in found.runs] == ["b", "a"]
    assert found.judged_by is not None and found.judged_by.label == "validation loss"


def test_what_differs_and_what_does_not(comparison: Comparison) -> None:
    assert comparison.differing == {"method.r": (8, 4, 8)}
    assert comparison.shared == {"train.learning_rate": 1e-3, "method.name": "lora"}


@pytest.mark.parametrize(
    ("one", "other", "differ"), [(1, 1.0, False), (1, True, True), (None, 0, True), ([1], [1], False)]
)
def test_equal_values(one: Any, other: Any, differ: bool) -> None:
    found = compare([run("a", 1.0, config={"x": one}), run("b", 2.0, config={"x": other})])
    assert ("x" in found.differing) == differ


def test_figures_that_are_all_alike_have_no_best() -> None:
    assert compare([run("a", 2.0), run("b", 2.0)]).figures[0].best == frozenset()


def test_answers_are_put_together_by_their_prompt(comparison: Comparison) -> None:
    (first, answers), (second, others) = comparison.prompts()
    assert (first["prompt"], answers) == ("p", ("good", "bad", None))
    assert (second["prompt"], others) == ("q", ("good", None, None))


def test_an_evaluation_belongs_to_the_run_that_it_names() -> None:
    trained = run("t", None)
    evaluation = Run("e", "e", "e", config={"evaluates": "t"}, summary={"adapter.loss": 2.0}, version="v0.1.0")
    orphan = Run("o", "o", "o", config={"evaluates": "gone"})
    one, other = joined([evaluation, trained, orphan])
    assert (one.id, one.summary, one.version, one.config) == ("t", {"adapter.loss": 2.0}, "v0.1.0", trained.config)
    assert other.id == "o"


def test_a_run_that_names_itself_is_kept() -> None:
    assert [one.id for one in joined([Run("a", "a", "a", config={"evaluates": "a"})])] == ["a"]


def test_series_leave_out_what_is_no_finite_number() -> None:
    rows = [{"s": 2, "x": 1.5, "y": True, "z": "NaN"}, {"s": 1, "x": float("inf")}, {"x": 9.0}, {"s": 2, "x": 2.5}]
    assert series(rows, "s") == {"x": [(2, 2.5)]}


def test_flat_configurations() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


def test_as_json_it_is_json(comparison: Comparison) -> None:
    told = json.loads(json.dumps(compare([*comparison.runs, run("nan", float("nan"))]).as_dict(), allow_nan=False))
    assert [one["name"] for one in told["runs"]] == ["better", "worse", "nan", "unknown"]
    assert told["runs"][0]["champion"] and told["runs"][0]["headlines"]["test loss"] == 2.5
    assert (told["judged_by"], told["differing"]) == ("test loss", ["method.r"])


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


def test_the_page_has_it_all(comparison: Comparison, tmp_path: Path) -> None:
    page = page_of(comparison, tmp_path)
    words = " ".join(page.text.split())
    for fact in (
        "3 runs, the best test loss first. ★ better is the champion.",
        "unknown: it was killed",
        "Training loss",
        "Validation loss",
        "Parameters against test loss",
        "Differing values; 2 other values are equal in all runs.",
        "2 held-out prompts",
        "not asked",
    ):
        assert fact in words, fact
    assert page.number("svg") == 2 + 1 + 1, "curves, parallel coordinates, a scatter"
    ids = [attributes["id"] for _, attributes in page.tags if (attributes.get("id") or "").startswith("run-")]
    assert len(ids) == len(set(ids))
    assert {f"run-{place}-training" for place in range(3)} <= set(ids)


def test_the_page_needs_nothing_from_elsewhere(comparison: Comparison, tmp_path: Path) -> None:
    page = page_of(comparison, tmp_path)
    for tag, attributes in page.tags:
        assert tag != "link" and not ({"src", "action"} & attributes.keys()), (tag, attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    (policy,) = [told["content"] for tag, told in page.tags if tag == "meta" and told.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none';")


def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    evil = {"name": EVIL, "where": EVIL, "version": EVIL, "state": EVIL, "warnings": (EVIL,)}
    sample = {"prompt": EVIL, "reference": EVIL, "base": EVIL, "adapter": EVIL}
    config = {EVIL: 1, "x": EVIL, "same": EVIL}
    history = {"loss": [(1, 2.0), (2, 1.0)]}
    runs = [
        Run("a", summary={"adapter.loss": 1.0}, config=config, samples=(sample,), history=history, **evil),
        Run("b", "b", "b", summary={"adapter.loss": 2.0}, config={EVIL: 2, "x": 1, "same": EVIL}),
    ]
    page = page_of(compare(runs), tmp_path)
    plain = page_of(compare([run("a", 1.0), run("b", 2.0, config={"x": 1, "y": 2})]), tmp_path)
    assert page.number("script") == plain.number("script") == 1
    assert page.number("img") == 0
    assert not [told for _, told in page.tags if any(name.startswith("on") for name in told)]
    assert page.text.count("<script>alert(1)</script>") >= 8


def test_one_run_and_runs_with_nothing_make_a_page_too(tmp_path: Path) -> None:
    assert "1 run" in page_of(compare([run("a", 2.0)]), tmp_path).text
    page = page_of(compare([Run("a", "a", "a"), Run("b", "b", "b")]), tmp_path)
    assert "differ in no recorded parameter" in page.text and page.number("svg") == 0


def test_forty_runs_are_told_apart_by_dashes(tmp_path: Path) -> None:
    page = page_of(compare([run(f"r{n}", 2 + n / 40, config={"method.r": n}) for n in range(40)]), tmp_path)
    assert page.number("button") == 40
    looks = {told["class"] for tag, told in page.tags if tag == "span" and (told.get("class") or "").startswith("line")}
    assert len(looks) == 4
