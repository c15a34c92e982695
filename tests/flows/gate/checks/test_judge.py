"""The gate's check of the judge's win rate."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow
import pytest
from gate_cases import champion_of, check, judge, reason

from flows.gate.candidate import AnswerPair, Candidate, Champion, Reevaluation
from flows.gate.gate import GateReport
from flows.gate.judging import judge_figures, outcome

RULE: dict[str, Any] = {"judge": {"callable": "data/judge.py:prefer"}, "champion": {"max_loss_regression": 1.0}}


def with_answers(table: pyarrow.Table, text: str, count: int = 10) -> pyarrow.Table:
    """Ten rows with answers, as many as have ROUGE-L."""
    answers = [f"{text} {n}" if n < count else None for n in range(40)]
    return table.append_column("adapter_answer", pyarrow.array(answers)).append_column(
        "reference", pyarrow.array([f"known {n}" if n < count else None for n in range(40)])
    )


@pytest.fixture
def good(make: Callable[..., Candidate]) -> Candidate:
    candidate = make()
    return replace(candidate, rows=with_answers(candidate.rows, "new"))


class Scripted:
    """A judge with these choices for every prompt; remembers the pairs."""

    def __init__(self, *choices: str) -> None:
        self.choices, self.pairs = choices, list[AnswerPair]()

    def __call__(self, pairs: Sequence[AnswerPair]) -> dict[str, Any]:
        self.pairs = list(pairs)
        replies = [{"choice": choice} for choice in self.choices]
        rows = [{"outcome": outcome(self.choices), "replies": replies} for _ in pairs]
        return judge_figures(rows, 0.95) | {"identity": {"callable": "c"}, "verdicts": "0" * 64}


def against(candidate: Candidate, judge: Any, **values: Any) -> Champion:
    champion = champion_of(candidate)
    rows = champion.rows.drop_columns(["adapter_answer", "reference"])
    return replace(champion, version="v0.1.0", rows=with_answers(rows, "old"), judge_answers=judge, **values)


def test_without_a_judge_or_a_champion_nothing_is_judged(good: Candidate) -> None:
    assert not [one for one in judge(good).checks if one.name == "judge"]
    assert check(judge(good, **RULE), "judge") == "no champion yet"
    fails = against(good, lambda pairs: pytest.fail("it was asked"))
    same = judge(replace(good, content="c"), replace(fails, content="c"), **RULE)
    assert check(same, "judge") == "it is the adapter of v0.1.0"
    worse = judge(good, fails, max_test_loss=0.1, **RULE)
    assert not [one for one in worse.checks if one.name == "judge"], "it is asked only about candidates that may pass"


def test_won_prompts_pass_and_the_report_keeps_the_figures(good: Candidate) -> None:
    scripted = Scripted("first", "second")
    report = judge(good, against(good, scripted), **RULE)
    assert report.passed
    assert len(scripted.pairs) == 10 and scripted.pairs[3] == AnswerPair("row3", "known 3", "new 3", "old 3")
    detail = check(report, "judge")
    assert "compared 10 answers with those of v0.1.0 in both orders: 10 won, 0 lost, 0 tied" in detail
    assert "win rate 1.000, 95% lower bound 0.741, to be above 0.4" in detail  # 0.05 ** (1 / 10)
    assert "the first answer got 50% of the choices" in detail
    high = judge(good, against(good, scripted), **RULE | {"judge": RULE["judge"] | {"confidence": 0.995}})
    assert ", 99.5% lower bound " in check(high, "judge")
    (kept,) = [one["figures"] for one in report.as_dict()["checks"] if "figures" in one]
    assert kept["won"] == 10 and kept["identity"] == {"callable": "c"}
    assert GateReport.from_dict(report.as_dict()) == report


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (("second", "first"), "0 won, 10 lost"),
        (("first", "first"), "10 tied, 0 with equal answers; no prompt was decided"),
        (("unreadable", "unreadable"), "10 without a readable verdict (they count as lost)"),
    ],
)
def test_lost_undecided_and_unreadable_prompts_refuse(good: Candidate, choices: tuple[str, str], expected: str) -> None:
    assert expected in reason(judge(good, against(good, Scripted(*choices)), **RULE))


def test_equal_answers_pass(good: Candidate) -> None:
    report = judge(good, against(good, Scripted()), **RULE)
    assert report.passed and "10 with equal answers; no prompt was decided" in check(report, "judge")


def test_a_margin_of_zero_asks_for_a_better_candidate(good: Candidate) -> None:
    def mixed(pairs: Sequence[AnswerPair]) -> dict[str, Any]:
        orders = [("first", "second")] * 7 + [("second", "first")] * 3
        rows = [{"outcome": outcome(order), "replies": [{"choice": one} for one in order]} for order in orders]
        return judge_figures(rows, 0.95) | {"identity": {}, "verdicts": ""}

    assert "lower bound 0.393, to be above 0.5" in reason(
        judge(good, against(good, mixed), **RULE | {"judge": RULE["judge"] | {"margin": 0.0}})
    )
    assert judge(good, against(good, mixed), **RULE | {"judge": RULE["judge"] | {"margin": 0.2}}).passed


def test_a_champion_with_other_rows_or_answers_is_answered_again(good: Candidate) -> None:
    scripted = Scripted("first", "second")
    again = with_answers(good.rows.drop_columns(["adapter_answer", "reference"]), "again").slice(0, 5)
    champion = against(good, scripted, evaluation_set="f" * 64, reevaluate_champion=lambda: Reevaluation(again, 35))
    champion = replace(champion, reevaluate_candidate=lambda: Reevaluation(good.rows, 0))
    report = judge(good, champion, slices={"max_loss_regression": None}, **RULE)
    assert [pair.champion for pair in scripted.pairs] == [f"again {n}" for n in range(5)], "rows it has not learned"
    assert "without 35 that it had been trained or validated on" in check(report, "judge")
    metrics = {**good.metrics, "answers": {"max_new_tokens": 40, "longer_known_answers": 0.0}}
    shorter = against(good, scripted, max_new_tokens=8)
    refused = judge(replace(good, metrics=metrics), shorter, **RULE)
    assert "v0.1.0 wrote answers of at most 8 tokens, and the candidate 40" in reason(refused)
    assert "gate.champion.reevaluate is false" in reason(refused)
