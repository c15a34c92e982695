"""The page in a real browser: no error, no request, what it promises of pointing and clicking, and no sideways scroll.

PEFTCORE_SCREENSHOTS=FOLDER keeps pictures of it there, for people to look at.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import Tab, executable, open_tab

from flows.review.comparison import compare
from flows.review.comparison_page import write_comparison
from flows.review.run import Run

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium here; `apt-get install chromium`")
WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with open_tab() as tab:
        yield tab


@pytest.fixture
def page(tmp_path: Path) -> Path:
    runs = [_run(place, rate, rank) for place, (rate, rank) in enumerate(zip(RATES, RANKS, strict=True))]
    runs[3] = replace(runs[3], is_champion=True)
    return write_comparison(compare(runs), tmp_path / "comparison.html", "v0.1.0 · wandb")


@pytest.mark.parametrize("device", WIDTHS)
def test_it_renders_with_no_complaint_and_no_request(tab: Tab, page: Path, device: str) -> None:
    tab.requests.clear()
    tab.open(page, WIDTHS[device])
    assert tab.requests == [page.as_uri()], "nothing but the file itself"
    assert tab.complaints == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= WIDTHS[device], "the page as a whole does not scroll"
    assert tab.evaluate("document.querySelectorAll('svg').length") == 2 + 1 + 3
    heights = tab.evaluate("[...document.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect().height)")
    assert min(heights) > 100
    if "PEFTCORE_SCREENSHOTS" in os.environ:
        tab.screenshot(Path(os.environ["PEFTCORE_SCREENSHOTS"]) / f"comparison-{device}.png")


def test_pointing_fades_the_others_and_clicking_hides(tab: Tab, page: Path) -> None:
    tab.open(page, WIDTHS["desktop"])
    faded = "document.querySelectorAll('.faded').length"
    visible = "getComputedStyle(document.querySelector('[id=\"run-1-training\"]')).display"
    tab.point_at("h1")
    assert tab.evaluate(faded) == 0
    tab.point_at("button[data-run='1']")
    others = tab.evaluate('document.querySelectorAll(\'[id^="run-"]:not([id^="run-1-"])\').length')
    assert tab.evaluate(faded) == others > 10
    tab.point_at("button[data-run='1']", click=True)
    assert tab.evaluate(visible) == "none"
    assert tab.evaluate("document.querySelectorAll('tr[data-of=\"1\"].off').length") == 1
    tab.point_at("button[data-run='1']", click=True)
    tab.point_at("h1")
    assert tab.evaluate(visible) != "none" and tab.evaluate(faded) == 0
    title = tab.evaluate("document.querySelector('#run-1-training title').textContent")
    assert title == tab.evaluate("document.querySelector(\"button[data-run='1']\").textContent.trim()")
    assert tab.complaints == []


NAMES = ("amber-lion", "brisk-owl", "calm-fox", "dusky-hare", "eager-newt", "fond-wren")
RATES = (2e-4, 5e-4, 5e-4, 1e-3, 1e-3, 2e-3)
RANKS = (8, 8, 16, 16, 32, 16)
PROMPTS = {
    "def chunked(rows, size):\n    for first in range(0, len(rows), size):\n        yield rows[first : first + size]": (
        "Yield successive lists of at most size rows.",
        "Here is a summary of the Python function: The `chunked` function takes two arguments, `rows` and",
        ("Yield successive chunks of rows.", "Yield successive lists of at most size rows.", "Split <rows> & co."),
    ),
    "def is_prime(n):\n    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))": (
        "Return True if n is a prime number.",
        "The function is_prime takes an integer n and checks whether it is prime using trial division.",
        ("Return True if n is prime.", "Test whether n is prime.", "Return whether n is a prime number."),
    ),
}


def _run(place: int, rate: float, rank: int) -> Run:
    """One of six runs with curves such as real ones have."""
    name = NAMES[place]
    final = 2.45 + 0.4 * abs(math.log10(rate / 9e-4)) + 0.4 / rank
    losses = [
        (step, final + 1.5 * math.exp(-step / (8 + 3 * place)) + 0.06 * math.sin(step * 2.4 + place))
        for step in range(1, 76)
    ]
    validation = [(step, final + 0.04 + 1.5 * math.exp(-step / (8 + 3 * place))) for step in range(15, 76, 15)]
    samples = tuple(
        {"prompt": prompt, "reference": reference, "base": base, "adapter": answers[place % 3]}
        for prompt, (reference, base, answers) in PROMPTS.items()
    )
    figures = {"adapter.loss": final, "adapter.perplexity": math.exp(final), "adapter.rouge_l": 0.8 - final / 5}
    modules = "all-linear" if place % 2 else ["q_proj", "v_proj"]
    return Run(
        id=name,
        name=name,
        where=f"wandb/offline-run-20261126_10000{place}-{name}",
        config={"train.learning_rate": rate, "method.r": rank, "method.target_modules": modules, "project.seed": 42},
        summary={**figures, "adapter.ended": 0.9 + place / 100, "training.best_validation_loss": final + 0.04},
        history={"loss": losses, "validation_loss": validation},
        samples=samples,
        version=f"v0.1.{place}",
    )
