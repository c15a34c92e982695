"""Check of a benchmark: how far the candidate's figure is below those of the base and the champion."""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from flows.gate.candidate import Candidate, Champion, CheckResult
from flows.gate.sequence import percent
from flows.params import Gate


def benchmark(candidate: Candidate, champion: Champion | None, gate: Gate, name: str) -> CheckResult:
    """Check the upper confidence bound of the drop against the base and against the champion.

    The bound is drop + z * sqrt(e1^2 + e2^2), with the harness's standard errors e1 and e2. The two errors are treated
    as independent. They are of the same questions, so the bound is on the safe side.
    """
    measured, limit = (candidate.metrics.get("benchmarks") or {}).get(name), gate.max_benchmark_drop
    if measured is None:
        return limit is None, "not measured, no limit set" if limit is None else "not measured; run the pipeline again"
    ours = measured["adapter"]
    others: dict[str, Mapping[str, Any]] = {"the base": measured["base"]}
    notes = ""
    if champion is not None and not (candidate.content and candidate.content == champion.content):
        theirs, notes = _of_champion(champion, name, measured, needed=limit is not None)
        if theirs is not None:
            others[champion.version] = theirs
        elif limit is not None:
            return False, f"{_value(ours)}; {notes}"
    passed, parts = True, [f"{_value(ours)} on {ours['rows']} rows"]
    for who, other in others.items():
        drop, upper = _drop(ours, other, gate.champion.confidence)
        confidence = percent(gate.champion.confidence)
        bound = "without a standard error" if upper is None else f"{confidence} upper bound {upper:+.4f}"
        allowed = "no limit set" if limit is None else f"at most {limit:g}"
        parts.append(f"drop against {who} ({_value(other)}) {drop:+.4f}, {bound}, {allowed}")
        passed = passed and (limit is None or (drop if upper is None else upper) <= limit)
    return passed, "; ".join([*parts, *([notes] if notes else [])])


def _of_champion(
    champion: Champion, name: str, ours: Mapping[str, Any], needed: bool
) -> tuple[Mapping[str, Any] | None, str]:
    """Return the champion's figures of the same benchmark, and a note. needed: re-evaluate the champion for it."""
    registered = champion.benchmarks.get(name)
    if registered is not None and registered["identity"] == ours["identity"]:
        return registered["adapter"], ""
    how = "with another form of" if registered else "without"
    why = f"{champion.version} was evaluated {how} the benchmark"
    if not needed:
        return None, why
    measured = champion.measured_benchmarks
    if measured is None:
        return None, f"{why}, and gate.champion.reevaluate is false"
    if name not in measured or measured[name]["identity"] != ours["identity"]:
        return None, f"{why}, and its files have changed since the candidate's evaluation"
    return measured[name]["adapter"], f"{why}, so it was re-evaluated"


def _drop(ours: Mapping[str, Any], other: Mapping[str, Any], confidence: float) -> tuple[float, float | None]:
    """Return the drop and its upper bound; a drop is positive if ours is worse. None without standard errors."""
    drop = (other["value"] - ours["value"]) * (1 if ours["higher"] else -1)
    if ours["stderr"] is None or other["stderr"] is None:
        return drop, None
    return drop, drop + NormalDist().inv_cdf(confidence) * math.hypot(ours["stderr"], other["stderr"])


def _value(figures: Mapping[str, Any]) -> str:
    error = "" if figures["stderr"] is None else f" ± {figures['stderr']:.4f}"
    return f"{figures['metric'].partition(',')[0]} {figures['value']:.4f}{error}"
