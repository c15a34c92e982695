"""The gate's check of prompt suites: new failures refuse, and failures of the champion are shown."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from gate_cases import champion_of, check, judge, reason
from made_up_results import suite_result

from flows.gate.candidate import Candidate, Champion

WHY = {"a": "it lacks 'x'"}
OPEN: dict[str, Any] = {"champion": {"max_loss_regression": 1.0}}
NAME = "suite support"


@pytest.fixture
def good(make: Callable[..., Candidate]) -> Candidate:
    return make()


def with_suites(candidate: Candidate, failed: dict[str, str], **identity: Any) -> Candidate:
    """Evaluated with a required suite, whose prompts `failed` fail."""
    suites = {"support": suite_result(failed, identity)}
    figures = {"prompts": 3, "failed": len(failed), "pass_rate": (3 - len(failed)) / 3, "pass_at": 1}
    figures = {"support": figures | {key: suites["support"][key] for key in ("content", "files")}}
    record = {**candidate.record, "metrics": {**candidate.record["metrics"], "suites": figures}}
    metrics = {**candidate.metrics, "suites": figures}
    return replace(candidate, suites=suites, required_suites=("support",), metrics=metrics, record=record)


def champion_with(candidate: Candidate, failed: dict[str, str], **identity: Any) -> Champion:
    return replace(champion_of(candidate), version="v0.1.0", suites={"support": suite_result(failed, identity)})


def test_without_suites_there_is_no_check(good: Candidate) -> None:
    assert not [one for one in judge(good).checks if one.name.startswith("suite")]


def test_without_a_failure_it_passes_and_the_champion_answers_nothing(good: Candidate) -> None:
    other = champion_with(good, {}, content="d" * 64)
    other = replace(other, reevaluate_suites=lambda: pytest.fail("it was re-evaluated"))
    assert check(judge(with_suites(good, {}), other, **OPEN), NAME) == "all 3 prompts pass"


def test_a_new_failure_refuses_with_prompt_and_answer(good: Candidate) -> None:
    report = judge(with_suites(good, WHY), champion_with(good, {}), **OPEN)
    assert reason(report) == (
        "suite support: 1 of 3 prompts fail, 1 of them new since v0.1.0, at most 0; new: a must contain 'x' "
        "[prompt: 'Tell <a>.'; answer: '<i>answer</i> a']"
    )


def test_a_failure_of_the_champion_too_is_shown_and_does_not_refuse(good: Candidate) -> None:
    report = judge(with_suites(good, WHY), champion_with(good, WHY | {"b": "x"}), **OPEN)
    assert report.passed
    detail = check(report, NAME)
    assert "1 of 3 prompts fail, 0 of them new since v0.1.0" in detail
    assert "v0.1.0 fails too: a must contain 'x' [prompt: 'Tell <a>.'; answer: '<i>answer</i> a']" in detail


def test_another_assertion_about_a_prompt_that_the_champion_fails_is_new(good: Candidate) -> None:
    champion = champion_with(good, WHY)
    champion.suites["support"]["prompts"][0]["answers"][0]["failed"] = {"1": "must refuse: it does not refuse"}
    report = judge(with_suites(good, WHY), champion, **OPEN)
    assert not report.passed and "1 of them new" in check(report, NAME)


def test_some_new_failures_can_be_allowed_or_shown_only(good: Candidate) -> None:
    ours, theirs = with_suites(good, WHY | {"b": "x"}), champion_with(good, {})
    assert not judge(ours, theirs, max_new_suite_failures=1, **OPEN).passed
    assert judge(ours, theirs, max_new_suite_failures=2, **OPEN).passed
    shown = judge(ours, theirs, max_new_suite_failures=None, **OPEN)
    assert shown.passed and "2 of 3 prompts fail, no limit set: a must" in check(shown, NAME)


def test_the_first_version_has_no_champion_to_share_a_failure_with(good: Candidate) -> None:
    assert "1 of 3 prompts fail, at most 0 without a champion" in reason(judge(with_suites(good, WHY)))
    assert judge(with_suites(good, WHY), max_new_suite_failures=1).passed


@pytest.mark.parametrize(
    ("registered", "why"),
    [({"support": suite_result({}, {"content": "d" * 64})}, "answered another version of the suite"), ({}, "without")],
)
def test_a_champion_of_another_suite_answers_again(good: Candidate, registered: Any, why: str) -> None:
    measured = replace(champion_of(good), suites=registered, reevaluate_suites=lambda: {"support": suite_result(WHY)})
    report = judge(with_suites(good, WHY), measured, **OPEN)
    assert report.passed
    assert why in check(report, NAME) and "so it was re-evaluated" in check(report, NAME)
    forbidden = judge(with_suites(good, WHY), replace(measured, reevaluate_suites=None), **OPEN)
    assert "gate.champion.reevaluate is false" in reason(forbidden)
    moved = replace(measured, reevaluate_suites=lambda: {"support": suite_result(WHY, {"content": "e" * 64})})
    assert "have changed since the candidate's evaluation" in reason(judge(with_suites(good, WHY), moved, **OPEN))


def test_the_champions_own_adapter_has_no_new_failures(good: Candidate) -> None:
    ours = replace(with_suites(good, WHY), content="c")
    report = judge(ours, replace(champion_with(good, {}), content="c"), **OPEN)
    assert report.passed and "it is the adapter of v0.1.0" in check(report, NAME)


def test_many_and_long_failures_are_cut(good: Candidate) -> None:
    ours = with_suites(good, dict.fromkeys("abc", "x"))
    prompts = ours.suites["support"]["prompts"]
    prompts += [prompts[0] | {"id": "d", "prompt": "p" * 1000}]
    prompts[0]["answers"][0]["text"] = "a" * 1000
    figures = {"prompts": 4, "failed": 4, "pass_rate": 0.0, "pass_at": 1, "content": "c" * 64, "files": {}}
    ours.metrics["suites"]["support"] |= figures
    detail = check(judge(ours, champion_with(good, {}), **OPEN), NAME)
    assert "and 1 more" in detail and len(detail) < 1000


def test_figures_that_do_not_follow_from_the_answers_are_refused(good: Candidate) -> None:
    ours = with_suites(good, {})
    ours.suites["support"]["prompts"][0]["answers"][0]["failed"] = {"0": "must contain 'x': it lacks 'x'"}
    assert "metrics.json says suites.support" in reason(judge(ours))
    assert "suites.json has none" in reason(judge(replace(with_suites(good, {}), suites={})))
