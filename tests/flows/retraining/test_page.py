"""The page of all retrainings: the newest first, with charts of what was measured, and no markup from data."""

from html.parser import HTMLParser
from typing import Any

import pytest

from flows.params import Params
from flows.paths import Paths
from flows.retraining.history import Entry, append
from flows.retraining.page import SHOWN, drift_chart, losses_chart, write_history_page

EVIL = "<img src=x onerror=alert(1)>$x$.jsonl"
LENGTH = {"median": 20.0, "p90": 40.0}


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def entries(self) -> int:
        return self.attributes.count(("class", "one"))


def entry(day: int, outcome: Any = "kept", **fields: Any) -> Entry:
    times = {"started": f"2026-01-{day:02}T03:00:00+00:00", "finished": f"2026-01-{day:02}T03:10:00+00:00"}
    return Entry(**times, outcome=outcome, **fields)


def trained(day: int, outcome: Any, loss: float, **fields: Any) -> Entry:
    metrics = {"base": {"loss": 3.0}, "adapter": {"loss": loss}}
    new = {"files": 2, "new_files": [f"week{day}.jsonl"], "seconds": {"make": 60.0, "register": 1.0}}
    return entry(day, outcome, version=f"v0.1.{day}", metrics=metrics, **new, **fields)


def drift_of(**losses: float) -> dict[str, Any]:
    files = {
        f"{name}.jsonl": {"rows": 30, "length": LENGTH, "divergence": 0.1, "loss": loss, "loss_error": 0.05}
        for name, loss in losses.items()
    }
    return {"champion_loss": 2.5, "files": files, "suspicious": {}, "older": None}


@pytest.fixture
def page_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """`page_of(entries)`: the page of a history with these entries, oldest first."""

    def write(*history: Entry) -> Page:
        paths = Paths(tmp_path)
        paths.retraining.mkdir(parents=True, exist_ok=True)
        for one in history:
            append(paths, one)
        made = write_history_page(Params.model_validate({"project": {"name": "docstrings"}}), paths)
        assert made == paths.retraining_page
        return Page(made.read_text())

    return write


def test_without_a_retraining_it_says_so(page_of: Any) -> None:
    page = page_of()
    assert "No retraining yet." in page.words and "Nothing is champion yet." in page.words
    assert (page.entries, page.tags.count("svg")) == (0, 0)


def test_a_quarantined_file_of_users_is_not_said_to_have_drifted_only(page_of: Any) -> None:
    words = page_of(trained(1, "kept", 2.75, quarantined=["feedback/week1.jsonl"], drift=drift_of(week1=2.6))).words
    assert "Quarantined (drifted too far, too small, or rows of users): trained on, but kept out" in words
    assert "file that is new to the champion" in words, "a refused candidate's files are measured again"


def test_the_newest_comes_first_and_the_last_promoted_version_is_the_champion(page_of: Any) -> None:
    page = page_of(
        trained(1, "promoted", 2.75),
        trained(2, "promoted", 2.5, champion="v0.1.1"),
        trained(3, "kept", 2.625, champion="v0.1.2", reason="against the champion: worse"),
        entry(4, "unchanged"),
        entry(5, "failed", reason="a cable was pulled"),
    )
    assert "v0.1.2 is champion since 02 January 2026, 03:10 UTC." in page.words
    assert page.entries == 5
    order = [page.words.index(text) for text in ("a cable was pulled", "nothing new", "worse", "week2", "week1")]
    assert order == sorted(order)
    for fact in (
        "2 files, 1 new: week3.jsonl; new adapter; test loss 3.000 → 2.625; champion before: v0.1.2.",
        "05 January 2026, 03:00 UTC",
        "1 min 1 s",
    ):
        assert fact in page.words, fact


def test_the_chart_of_losses_has_the_candidates_and_the_chart_of_drift_the_measured_files(page_of: Any) -> None:
    assert page_of(entry(1, "unchanged"), entry(2, "failed")).tags.count("svg") == 0
    assert page_of(trained(3, "promoted", 2.5)).tags.count("svg") == 1
    unmeasured = {"files": {"tiny.jsonl": {"rows": 1, "length": LENGTH}}, "suspicious": {}, "older": None}
    assert page_of(trained(4, "kept", 2.5, drift=unmeasured)).tags.count("svg") == 1
    page = page_of(trained(5, "kept", 2.5, drift=drift_of(odd=4.0)))
    assert page.tags.count("svg") == 2
    assert "Drift of new rows" in page.words and "4.00" in page.words


def test_it_shows_the_newest_retrainings_and_the_history_keeps_all(page_of: Any, tmp_path: Any) -> None:
    history = [entry(1 + day % 28, reason=f"number {day}.") for day in range(SHOWN + 3)]
    page = page_of(*history)
    assert page.entries == SHOWN
    assert "number 3." in page.words and "number 2." not in page.words
    assert len(Paths(tmp_path).retraining_history.read_text().splitlines()) == SHOWN + 3


def test_nothing_from_data_becomes_markup(page_of: Any) -> None:
    drift = drift_of(a=2.0)
    drift["files"] = {EVIL: drift["files"]["a.jsonl"]}
    drift["suspicious"] = {EVIL: EVIL}
    files = {"quarantined": [EVIL], "excluded": [EVIL], "skipped": {EVIL: EVIL}, "drift": drift}
    page = page_of(trained(1, "kept", 2.5, reason=EVIL, **files))
    assert "img" not in page.tags and "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count(EVIL) >= 7


def test_promoted_and_refused_candidates_are_told_apart(tmp_path: Any) -> None:
    promoted, refused = trained(1, "promoted", 2.5), trained(2, "kept", 2.75)
    both = Page(losses_chart([promoted, refused])).text
    for text in ("promoted", "refused", "base", "2.500", "2.750", "v0.1.1", "v0.1.2"):
        assert text in both, text
    assert "refused" not in Page(losses_chart([promoted])).text


def test_each_new_file_is_named_in_the_chart_of_drift_and_a_long_name_is_cut() -> None:
    name = "the_long_name_of_a_weekly_export"
    text = Page(drift_chart([trained(1, "kept", 2.5, drift=drift_of(**{"short": 2.5, name: 3.5}))])).text
    assert "short" in text and f"{name[:20]}…" in text and name not in text
