"""The page that compares runs: it shows them all, needs nothing else, and nothing in a run can change it."""

from html.parser import HTMLParser
from pathlib import Path

from compared_runs import EVIL, run

from flows.review.comparison import Comparison, compare
from flows.review.comparison_page import write_comparison
from flows.review.run import Run


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
