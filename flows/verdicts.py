"""Verdicts of prompt suites: which prompts fail by which assertions, from the answers in suites.json.

An assertion with n answers, c of which meet it, fails if pass@k is below the suite's `at_least`, where

    pass@k = 1 - C(n - c, k) / C(n, k)

is the unbiased estimate of the probability that at least one of k answers passes (Chen et al., "Evaluating Large
Language Models Trained on Code", arXiv:2107.03374). Without sampling, n = k = 1.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

TOGETHER = "must meet all assertions in one answer"
"""The failure of a prompt whose assertions each pass, but not together."""
IDENTITY = ("content", "files")
"""Keys of a suite's result that two versions must share to be compared; see `Suite.identity`."""


class Failure(NamedTuple):
    """A failing prompt. assertions: the failed ones in words. answer: the first answer that fails one of them."""

    id: str
    prompt: str
    assertions: tuple[str, ...]
    answer: str
    reasons: tuple[str, ...]
    """Why that answer fails, in words."""

    @property
    def keys(self) -> frozenset[tuple[str, str]]:
        """(prompt, assertion) of each failed assertion."""
        return frozenset((self.id, assertion) for assertion in self.assertions)


def pass_at_k(answers: int, passed: int, k: int) -> float:
    """Return the estimated probability that at least one of k answers passes, from `passed` of `answers` (n >= k)."""
    # one division of integers, whose rounding is that of a limit such as 0.2; 1 - 4/5 is below it
    return (math.comb(answers, k) - math.comb(answers - passed, k)) / math.comb(answers, k)


def suite_failures(result: Mapping[str, Any]) -> list[Failure]:
    """Return the failing prompts of a suite, in its order.

    Args:
        result: The suite's entry in suites.json, with the keys `pass_at`, `at_least` and `prompts`.
    """
    failures = []
    for prompt in result["prompts"]:
        if prompt_passes(result, prompt):
            continue
        failed = [answer["failed"] for answer in prompt["answers"]]
        words = tuple(
            words
            for index, words in enumerate(prompt["must"])
            if _rate(result, [str(index) not in one for one in failed]) < result["at_least"]
        )
        first = next(answer for answer in prompt["answers"] if answer["failed"])
        reasons = tuple(first["failed"].values())
        failures.append(Failure(prompt["id"], prompt["prompt"], words or (TOGETHER,), first["text"], reasons))
    return failures


def prompt_passes(result: Mapping[str, Any], prompt: Mapping[str, Any]) -> bool:
    """Return True if the pass@k of the prompt reaches the suite's limit."""
    return prompt_rate(result, prompt) >= result["at_least"]


def prompt_rate(result: Mapping[str, Any], prompt: Mapping[str, Any]) -> float:
    """Return pass@k of a prompt; an answer passes if it meets all assertions."""
    return _rate(result, [not answer["failed"] for answer in prompt["answers"]])


def suite_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a suite for metrics.json: numbers of prompts, and their mean pass@k."""
    rates = [prompt_rate(result, prompt) for prompt in result["prompts"]]
    return {
        "prompts": len(rates),
        "failed": sum(rate < result["at_least"] for rate in rates),
        "pass_rate": sum(rates) / len(rates),
        "pass_at": result["pass_at"],
    }


def is_same_suite(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Return True if two results are of the same suite, scorers and settings."""
    return one is not None and other is not None and all(one.get(key) == other.get(key) for key in IDENTITY)


def _rate(result: Mapping[str, Any], passed: list[bool]) -> float:
    return pass_at_k(len(passed), sum(passed), result["pass_at"])
