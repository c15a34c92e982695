"""The gate's check of benchmarks: the upper bound of the drop against base and champion."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from gate_cases import champion_of, check, judge, reason

from flows.gate.candidate import Candidate, Champion

OPEN: dict[str, Any] = {"champion": {"max_loss_regression": 1.0}}
NAME = "benchmark quiz"
IDENTITY = {"task": "quiz", "num_fewshot": None, "limit": None, "metric": None, "files": {}}


def figures(value: float, stderr: float | None = 0.01, higher: bool = True) -> dict[str, Any]:
    return {"metric": "acc,none", "value": value, "stderr": stderr, "higher": higher, "rows": 100}


def measured(adapter: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"quiz": {"identity": IDENTITY, "base": base or figures(0.5), "adapter": adapter}}


@pytest.fixture
def good(make: Callable[..., Candidate]) -> Candidate:
    return make()


def with_benchmark(candidate: Candidate, adapter: dict[str, Any], base: dict[str, Any] | None = None) -> Candidate:
    benchmarks = measured(adapter, base)
    record = {**candidate.record, "metrics": {**candidate.record["metrics"], "benchmarks": benchmarks}}
    metrics = {**candidate.metrics, "benchmarks": benchmarks}
    return replace(candidate, metrics=metrics, record=record, required_benchmarks=("quiz",))


def champion_with(candidate: Candidate, benchmarks: dict[str, Any], **values: Any) -> Champion:
    return replace(champion_of(candidate), version="v0.1.0", benchmarks=benchmarks, **values)


def test_without_benchmarks_there_is_no_check(good: Candidate) -> None:
    assert not [one for one in judge(good).checks if one.name.startswith("benchmark")]


def test_the_bound_is_the_drop_and_both_standard_errors(good: Candidate) -> None:
    ours = with_benchmark(good, figures(0.48, 0.02), figures(0.5, 0.01))
    bound = 0.02 + 1.6448536 * math.hypot(0.02, 0.01)  # the 95th percentile of the normal distribution
    high = judge(ours, champion={"max_loss_regression": 1.0, "confidence": 0.995})
    assert ", 99.5% upper bound " in check(high, NAME)
    refused = judge(ours, max_benchmark_drop=bound - 1e-4)
    assert f"drop against the base (acc 0.5000 ± 0.0100) +0.0200, 95% upper bound {bound:+.4f}" in reason(refused)
    assert judge(ours, max_benchmark_drop=bound + 1e-4).passed
    shown = judge(ours)
    assert shown.passed and "no limit set" in check(shown, NAME)


def test_a_drop_against_the_champion_refuses_although_the_base_is_worse(good: Candidate) -> None:
    ours, theirs = with_benchmark(good, figures(0.6)), champion_with(good, measured(figures(0.7)))
    report = judge(ours, theirs, max_benchmark_drop=0.05, **OPEN)
    assert "drop against v0.1.0 (acc 0.7000 ± 0.0100) +0.1000" in reason(report)
    assert judge(ours, champion_with(good, measured(figures(0.6))), max_benchmark_drop=0.05, **OPEN).passed


def test_lower_can_be_better_and_an_error_can_be_missing(good: Candidate) -> None:
    worse = with_benchmark(good, figures(12.0, None, False), figures(10.0, None, False))
    assert "+2.0000, without a standard error, at most 1" in reason(judge(worse, max_benchmark_drop=1.0))
    better = with_benchmark(good, figures(9.0, None, False), figures(10.0, None, False))
    assert judge(better, max_benchmark_drop=0.0).passed


@pytest.mark.parametrize(
    ("registered", "why"),
    [
        ({}, "without the benchmark"),
        ({"quiz": {"identity": IDENTITY | {"limit": 5}}}, "with another form of the bench"),
    ],
)
def test_a_champion_without_the_figures_is_measured(good: Candidate, registered: Any, why: str) -> None:
    ours = with_benchmark(good, figures(0.6))
    theirs = champion_with(good, registered, reevaluate_benchmarks=lambda: measured(figures(0.9)))
    refused = judge(ours, theirs, max_benchmark_drop=0.05, **OPEN)
    assert f"v0.1.0 was evaluated {why}" in reason(refused) and "+0.3000" in reason(refused)
    forbidden = judge(ours, replace(theirs, reevaluate_benchmarks=None), max_benchmark_drop=0.05, **OPEN)
    assert "gate.champion.reevaluate is false" in reason(forbidden)
    other = replace(theirs, reevaluate_benchmarks=dict)
    assert "files have changed" in reason(judge(ours, other, max_benchmark_drop=0.05, **OPEN))
    unlimited = replace(theirs, reevaluate_benchmarks=lambda: pytest.fail("it was measured without a limit"))
    assert judge(ours, unlimited, **OPEN).passed


def test_the_champions_own_adapter_is_compared_with_the_base_alone(good: Candidate) -> None:
    ours = replace(with_benchmark(good, figures(0.6)), content="c")
    theirs = replace(champion_with(good, {}), content="c")
    assert judge(ours, theirs, max_benchmark_drop=0.05, **OPEN).passed
