"""Verdicts of prompt suites, against their definition: pass@k is a probability over subsets of the answers."""

from itertools import combinations
from typing import Any

import pytest

from flows.verdicts import TOGETHER, is_same_suite, pass_at_k, suite_failures, suite_figures


def prompt(name: str, *failed: dict[str, str], must: tuple[str, ...] = ("one", "two")) -> dict[str, Any]:
    answers = [{"text": f"{name} {n}", "failed": one} for n, one in enumerate(failed)]
    return {"id": name, "prompt": f"prompt {name}", "must": list(must), "answers": answers}


def result(*prompts: dict[str, Any], pass_at: int = 1, at_least: float = 1.0) -> dict[str, Any]:
    return {"pass_at": pass_at, "at_least": at_least, "prompts": list(prompts), "content": "c", "files": {}}


@pytest.mark.parametrize("answers", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_passing_answer(answers: int) -> None:
    for passed in range(answers + 1):
        for k in range(1, answers + 1):
            subsets = list(combinations([True] * passed + [False] * (answers - passed), k))
            assert pass_at_k(answers, passed, k) == sum(map(any, subsets)) / len(subsets)


def test_a_greedy_answer_fails_by_each_assertion_that_it_fails() -> None:
    suite = result(prompt("a", {}), prompt("b", {"1": "two: why"}), prompt("c", {"0": "one: x", "1": "two: y"}))
    failures = suite_failures(suite)
    assert [(one.id, one.assertions, one.reasons) for one in failures] == [
        ("b", ("two",), ("two: why",)),
        ("c", ("one", "two"), ("one: x", "two: y")),
    ]
    assert failures[1].keys == {("c", "one"), ("c", "two")}
    assert suite_figures(suite) == {"prompts": 3, "failed": 2, "pass_rate": pytest.approx(1 / 3), "pass_at": 1}


def test_sampled_answers_fail_by_their_pass_at_k() -> None:
    one_of_four = prompt("a", {"0": "one: x"}, {}, {"0": "one: x"}, {"0": "one: x"})
    assert suite_failures(result(one_of_four, pass_at=4)) == []
    assert suite_failures(result(one_of_four, pass_at=2, at_least=0.5)) == []  # 1 - C(3,2)/C(4,2) = 0.5
    (failure,) = suite_failures(result(one_of_four, pass_at=2, at_least=0.51))
    assert (failure.assertions, failure.answer) == (("one",), "a 0")


def test_assertions_that_pass_in_different_answers_fail_together() -> None:
    (failure,) = suite_failures(result(prompt("a", {"0": "one: x"}, {"1": "two: y"}), pass_at=2))
    assert failure.assertions == (TOGETHER,)


def test_results_of_another_content_or_another_file_are_not_the_same_suite() -> None:
    one = result(prompt("a", {}))
    assert is_same_suite(one, result(prompt("a", {"0": "one: x"})))
    assert not is_same_suite(one, one | {"content": "d"})
    assert not is_same_suite(one, one | {"files": {"data/a.json": "0"}})
    assert not is_same_suite(one, None)
