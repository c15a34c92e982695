"""The summary of a run in the terminal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.gate.gate import Check, GateReport
from flows.gate.promote import Promotion
from flows.gate.proposal import Proposal
from flows.paths import Paths
from flows.review.summary import figure, print_summary

SIDES = {
    "base": {"loss": 3.8, "rouge_l": 0.16, "ended": None, "tokens_per_second": 200.4},
    "adapter": {"loss": 2.7, "rouge_l": 0.31, "ended": 0.875, "tokens_per_second": 80.0},
}
PROMOTED = Promotion("docstrings", "v0.1.0", "champion", "promoted", "docstrings#champion#1", None)


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`printed(sides, promotion, page, width)`: the summary of a run with these figures."""

    def show(
        sides: dict[str, Any] = SIDES, promotion: Promotion = PROMOTED, page: str = "/p.html", width: int = 120
    ) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        paths = Paths(tmp_path)
        paths.metrics.write_text(json.dumps({**sides, "merge": {"kl": 0.00219, "top1_agreement": 0.991}}))
        print_summary(paths, promotion, Path(page), {"make": 61.25, "register": 0.5})
        return capsys.readouterr().out

    return show


def rows(text: str) -> dict[str, list[str]]:
    """{label: its cells} of the table."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {label: cells for label, *cells in lines}


def test_the_time_per_token_is_that_of_one_request(printed: Callable[..., str]) -> None:
    latency = {
        "base": {"first_token_ms": 189.0, "token_ms": 50.1},
        "adapter": {"first_token_ms": 233.0, "token_ms": 59.5},
    }
    assert rows(printed(SIDES | {"latency": latency}))["ms per token, one request"] == ["50", "60"]
    assert "ms per token, one request" not in rows(printed(SIDES | {"latency": None}))


def test_figures_of_both_models_are_side_by_side(printed: Callable[..., str]) -> None:
    text = printed()
    assert rows(text) == {
        "test loss (nats)": ["3.800", "2.700"],
        "ROUGE-L": ["0.160", "0.310"],
        "EOS rate": ["–", "87.5%"],
    }, "figures that the objective lacks have no row"
    words = " ".join(text.split())
    for fact in (
        "docstrings v0.1.0",
        "merged KL 0.0022 nats, top-1 predictions agree on 99.1%",
        "verdict docstrings v0.1.0 is champion",
        "make 61.2 · register 0.5",
        "page /p.html",
    ):
        assert fact in words, fact


def test_a_figure_that_only_one_model_has_is_shown(printed: Callable[..., str]) -> None:
    sides = {"base": {"loss": 3.8}, "adapter": {"loss": 2.7, "accuracy": 0.5}}
    assert rows(printed(sides))["accuracy"] == ["–", "50.0%"]


def test_a_column_of_a_baseline_says_so(printed: Callable[..., str]) -> None:
    text = printed(SIDES | {"baseline": "passages in random order"})
    assert "on held-out rows ┃ baseline ┃ adapter" in text
    assert "baseline passages in random order, because the base has no trained head" in " ".join(text.split())
    assert "baseline" not in printed()


def test_a_scorer_is_a_row(printed: Callable[..., str]) -> None:
    sides: dict[str, Any] = {"base": {"loss": 3.8, "token_f1": None}, "adapter": {"loss": 2.7, "token_f1": 0.5}}
    assert rows(printed(sides | {"scorers": {"token_f1": {}}}))["token_f1 (scorer)"] == ["–", "0.500"]


def test_a_reason_with_brackets_is_shown_as_it_is(printed: Callable[..., str]) -> None:
    failed = Check("slices", False, "[red] of [/green] is worse")
    refused = Promotion("docstrings", "v0.1.0", "champion", "refused", None, GateReport("v0.1.0", None, (failed,)))
    assert "slices: [red] of [/green] is worse" in " ".join(printed(promotion=refused).split())


def test_the_path_of_the_page_is_in_one_piece_on_a_narrow_terminal(printed: Callable[..., str]) -> None:
    page = f"/home/ada/{'a_long_folder/' * 6}review.html"
    assert page in printed(page=page, width=40)


def test_a_missing_figure_is_a_dash() -> None:
    assert (figure(None, "{:.1%}"), figure(0.125, "{:.1%}")) == ("–", "12.5%")


def test_suites_have_the_number_of_passed_prompts(printed: Callable[..., str]) -> None:
    text = printed(SIDES | {"suites": {"support": {"prompts": 12, "failed": 2}}})
    assert rows(text)["support (suite), prompts passed"] == ["–", "10 of 12"]


def test_limits_that_a_first_version_supports_are_printed(
    printed: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "peftcore limits" not in printed()
    proposals = [Proposal("min_loss_gain", 0.48, 0.0, "why [it] fits")]
    print_summary(Paths(tmp_path), PROMOTED, Path("/p.html"), {}, proposals)
    text = capsys.readouterr().out
    assert "`peftcore limits --write` writes them" in text
    assert "gate:\n  min_loss_gain: 0.48  # now 0; why [it] fits\n" in text
