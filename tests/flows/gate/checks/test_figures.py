"""A candidate's own figures against their limits, and what is said with a figure that is refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from gate_cases import LATENCY, check, judge, of_objective, reason, with_merge, with_scores

from flows.gate.candidate import Candidate
from flows.gate.checks import figures
from flows.params import Gate, Rule


def candidate(ended: float, answers: dict[str, Any] | None) -> Any:
    return SimpleNamespace(metrics={"adapter": {"ended": ended}, "answers": answers})


@pytest.mark.parametrize(
    ("ended", "longer", "words"),
    [
        (0.85, 0.2, "20% of the reference answers have more tokens than evaluate.max_new_tokens, 40"),
        (0.85, 0.0, None),
        (0.95, 0.2, None),
    ],
)
def test_answers_that_cannot_end_are_told_with_the_limit_that_cuts_them(
    ended: float, longer: float, words: str | None
) -> None:
    answers = {"max_new_tokens": 40, "longer_known_answers": longer}
    passed, told = figures.eos_rate(candidate(ended, answers), Gate(min_eos_rate=0.9))
    assert passed == (ended >= 0.9)
    assert told.startswith(f"{ended:.3f}, at least 0.9")
    assert (words in told and told.endswith("raise it")) if words else told.endswith("0.9")


def test_an_evaluation_that_did_not_count_them_says_nothing_of_them() -> None:
    assert figures.eos_rate(candidate(0.5, None), Gate(min_eos_rate=0.9)) == (False, "0.500, at least 0.9")


def test_limits_can_be_left_out(make: Callable[..., Candidate]) -> None:
    report = judge(make(loss=3.7), min_loss_gain=None, min_rouge_l_gain=None, min_eos_rate=None)
    told = {check.name: check.detail for check in report.checks}
    assert report.passed
    assert told["gain in loss"] == "0.100 nats, no limit set"
    assert told["gain in ROUGE-L"] == "0.150, no limit set" and told["EOS rate"] == "1.000, no limit set"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_test_loss": 2.6}, "test loss: 2.700 nats, at most 2.6"),
        ({"min_loss_gain": 1.2}, "gain in loss: 1.100 nats, at least 1.2"),
        ({"min_rouge_l_gain": 0.2}, "gain in ROUGE-L: 0.150, at least 0.2"),
    ],
)
def test_each_threshold_refuses(make: Callable[..., Candidate], limits: dict[str, float], expected: str) -> None:
    assert reason(judge(make(), **limits)) == expected


def test_a_threshold_that_is_met_exactly_passes(make: Callable[..., Candidate]) -> None:
    candidate = make(adapter={"loss": 3.3, "rouge_l": 0.31, "ended": 1.0})
    assert judge(candidate, min_loss_gain=candidate.metrics["gain"]["loss"]).passed


@pytest.mark.parametrize(("ended", "found"), [(0.5, "0.500"), (None, "not measured")])
def test_answers_that_do_not_end_or_were_not_measured(
    make: Callable[..., Candidate], ended: float | None, found: str
) -> None:
    side = {"loss": 2.7, "rouge_l": 0.3, "ended": ended}
    assert reason(judge(make(adapter=side))) == f"EOS rate: {found}, at least 0.9"


def test_a_loss_that_is_no_number_is_refused(make: Callable[..., Candidate]) -> None:
    side = {"loss": float("nan"), "rouge_l": 0.3, "ended": 1.0}
    assert reason(judge(make(adapter=side))).startswith("test loss: nan")


@pytest.mark.parametrize("merge", [{"kl": 0.06, "top1_agreement": 0.99}, {"kl": 0.0, "top1_agreement": 0.84}])
def test_an_unfaithful_merge_is_refused(make: Callable[..., Candidate], merge: dict[str, float]) -> None:
    report = judge(with_merge(make(), merge))
    assert reason(report).startswith("merge fidelity: KL")


def test_a_threshold_on_what_an_objective_does_not_have_is_passed_over_and_said(make: Callable[..., Candidate]) -> None:
    candidate = make(**of_objective("classification", "cross entropy of classes", accuracy=0.8))
    report = judge(candidate, min_accuracy=0.75)
    details = {check.name: check.detail for check in report.checks}
    assert report.passed
    for name in ("gain in ROUGE-L", "EOS rate"):
        assert details[name].startswith("not checked: classification has no such figure")
    assert details["accuracy"] == "0.800, at least 0.75"
    assert reason(judge(candidate, min_accuracy=0.85)) == "accuracy: 0.800, at least 0.85"
    chats = judge(make("v0.3.0"), min_accuracy=0.85)
    assert chats.passed
    assert {c.name: c.detail for c in chats.checks}["accuracy"].startswith("not checked: sft has no such figure")


def test_a_figure_that_an_objective_has_and_was_not_measured_is_refused(make: Callable[..., Candidate]) -> None:
    pairs = make(**of_objective("dpo", "Dpo(beta=0.1)", accuracy=0.8, ended=1.0))
    assert reason(judge(pairs)).startswith("gain in ROUGE-L: not measured")


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        ({"max_first_token_ms": 80.0}, "first token 90.00 ms, at most 80"),
        ({"max_token_ms": 45.0}, "token 50.00 ms, at most 45"),
        ({"max_slowdown": 1.2}, "slowdown 1.25-fold, at most 1.2"),
    ],
)
def test_each_latency_has_its_limit(make: Callable[..., Candidate], limit: dict[str, float], found: str) -> None:
    assert found in reason(judge(make(latency=LATENCY), **limit))
    assert judge(make(latency=LATENCY), **dict.fromkeys(limit, 100.0)).passed
    assert reason(judge(make(), **limit)).startswith("latency: not measured")
    assert check(judge(make(latency=LATENCY)), "latency").endswith("no limit set")
    texts = make(**of_objective("classification", "cross entropy of classes", accuracy=0.8), latency=None)
    assert check(judge(texts, **limit), "latency") == "not checked: classification generates no text"


@pytest.mark.parametrize(
    ("value", "limit", "result"),
    [
        (0.5, 0.5, (True, "0.500 nats, at least 0.5")),
        (0.499, 0.5, (False, "0.499 nats, at least 0.5")),
        (None, 0.5, (False, "not measured, at least 0.5 nats")),
        (None, None, (True, "not measured, no limit set")),
        (float("nan"), 0.5, (False, "nan nats, at least 0.5")),
    ],
)
def test_a_lower_limit_needs_a_number_that_reaches_it(
    value: float | None, limit: float | None, result: tuple[bool, str]
) -> None:
    assert figures.at_least(value, limit, "nats") == result


@pytest.mark.parametrize(
    ("rule", "detail"),
    [
        ({"limit": 0.7}, "0.750, at least 0.7"),
        ({"limit": 0.8}, "0.750, at least 0.8"),
        ({"gain": 0.25}, "0.750, no limit set; gain over the base 0.250, at least 0.25"),
        ({"limit": 0.7, "gain": 0.3}, "0.750, at least 0.7; gain over the base 0.250, at least 0.3"),
        ({"limit": 0.75, "direction": "lower"}, "0.750, at most 0.75"),
        ({"gain": 0.0, "direction": "lower"}, "0.750, no limit set; gain over the base -0.250, at least 0"),
    ],
)
def test_a_rule_limits_a_scorer(make: Callable[..., Candidate], rule: dict[str, Any], detail: str) -> None:
    report = judge(with_scores(make(), [0.75] * 40), rules=[Rule(metric="token_f1", **rule)])
    assert check(report, "rule on token_f1") == detail
    passes = rule in ({"limit": 0.7}, {"gain": 0.25}, {"limit": 0.75, "direction": "lower"})
    assert report.passed == passes


def test_a_rule_says_how_often_its_scorer_failed(make: Callable[..., Candidate]) -> None:
    candidate = with_scores(make(), [0.75] * 40)
    record = candidate.metrics["scorers"]["token_f1"]
    record |= {"on_error": 0.0, "failures": {"base": 0, "adapter": 3}}
    report = judge(candidate, rules=[Rule(metric="token_f1", limit=0.5)])
    assert check(report, "rule on token_f1") == "0.750, at least 0.5; the scorer failed on 3 of 40, which got 0"


def test_a_rule_on_a_figure_that_was_not_measured_refuses(make: Callable[..., Candidate]) -> None:
    report = judge(make(), rules=[Rule(metric="token_f1", limit=0.5)])
    assert reason(report) == "rule on token_f1: not measured, at least 0.5"


def test_a_limit_as_a_rule_decides_as_the_limit_does(make: Callable[..., Candidate]) -> None:
    for rouge_l in (0.19, 0.21):
        candidate = make(adapter={"loss": 2.7, "rouge_l": rouge_l, "ended": 1.0})
        fixed = judge(candidate, min_rouge_l_gain=0.04)
        ruled = judge(candidate, min_rouge_l_gain=None, rules=[Rule(metric="rouge_l", gain=0.04)])
        assert fixed.passed == ruled.passed == (rouge_l == 0.21)
