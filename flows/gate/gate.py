"""The promotion gate: ordered checks of a candidate. A refusal names every check that failed.

If one of the `DECISIVE` checks fails, such as that of the registered files, no further check is made, because all later
checks depend on it. All limits on the candidate's own figures are checked. The comparison with the champion, which may
need a re-evaluation, is made only if the candidate is within those limits.

The gate reads the candidate's adapter folder and changes nothing. Losses are losses of test rows: mean nats per
supervised token, or the unit of the objective.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from flows.gate.candidate import Candidate, Champion, CheckResult, ResultWithFigures
from flows.gate.checks import champion as against
from flows.gate.checks import figures, files, people
from flows.gate.checks.benchmarks import benchmark
from flows.gate.checks.calibration import calibration
from flows.gate.checks.evidence import evidence
from flows.gate.checks.forgetting import forgetting
from flows.gate.checks.judge import judged
from flows.gate.checks.measured import evaluation_settings
from flows.gate.checks.suites import prompt_suite
from flows.gate.sequence import at_look, look_result
from flows.params import Gate, Merge

DECISIVE = frozenset(
    ("not withdrawn", "allowed files", "manifest", "evidence", "evaluation settings", "signature", "finite weights")
)
"""Checks that later checks depend on. If one fails, no further check is made."""
COMPARING = frozenset(("against the champion", "the champion's rows", "slices", "judge"))
"""Checks made only if no earlier check has failed, like those of suites, benchmarks and bounds of rules."""


@dataclass(frozen=True)
class Check:
    """A `CheckResult` with the name of its check. detail: the measured and the allowed value, in words."""

    name: str
    passed: bool
    detail: str
    figures: Mapping[str, Any] | None = None
    """Figures behind the detail, which only some checks give."""


@dataclass(frozen=True)
class GateReport:
    """The checks that were made, in order."""

    version: str
    champion: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str | None:
        """All failed checks with their details; None if every check passed."""
        failed = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        return "; ".join(failed) or None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        checks = [{key: value for key, value in asdict(check).items() if value is not None} for check in self.checks]
        return {**asdict(self), "checks": checks, "passed": self.passed, "reason": self.reason}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "GateReport":
        """Return the report that `as_dict` wrote."""
        return cls(value["version"], value["champion"], tuple(Check(**check) for check in value["checks"]))


def evaluate_gate(candidate: Candidate, champion: Champion | None, gate: Gate, merge: Merge, seed: int) -> GateReport:
    """Judge a candidate.

    Args:
        candidate: the version to judge.
        champion: the version that holds the stage; None if the stage is free.
        gate: the limits.
        merge: the limits on the merged model's fidelity.
        seed: seed of the bootstrap's resamples, so that two versions always get the same verdict.
    """
    bounds = {f"{rule.metric} against the champion" for rule in gate.rules if rule.bound is not None}
    results: list[Check] = []
    for name, check in _checks(candidate, champion, gate, merge, seed):
        refused = not all(each.passed for each in results)
        if refused and (name in COMPARING or name in bounds or name.startswith(("suite ", "benchmark "))):
            continue
        passed, detail, *further = check()
        results.append(Check(name, passed, detail, further[0] if further else None))
        if name in DECISIVE and not results[-1].passed:
            break
    return GateReport(candidate.version, champion.version if champion else None, tuple(results))


def _checks(
    candidate: Candidate, champion: Champion | None, gate: Gate, merge: Merge, seed: int
) -> Iterator[tuple[str, Callable[[], CheckResult | ResultWithFigures]]]:
    """Yield the names of the checks and their functions, in order."""
    look, compared = candidate.look, at_look(gate, candidate.look)
    yield "not withdrawn", lambda: people.not_withdrawn(candidate, gate)
    yield "allowed files", lambda: files.allowed_files(candidate)
    yield "manifest", lambda: files.manifest(candidate)
    yield "evidence", lambda: evidence(candidate)
    yield "evaluation settings", lambda: evaluation_settings(candidate)
    yield "signature", lambda: people.signature(candidate, gate)
    yield "finite weights", lambda: files.finite_weights(candidate)
    yield "test loss", lambda: figures.test_loss(candidate, gate)
    yield "gain in loss", lambda: figures.gain_in_loss(candidate, gate)
    yield "gain in ROUGE-L", lambda: figures.figure(candidate, "gain", "rouge_l", gate.min_rouge_l_gain)
    yield "EOS rate", lambda: figures.eos_rate(candidate, gate)
    for rule in gate.rules:
        if rule.limit is not None or rule.gain is not None:
            yield f"rule on {rule.metric}", partial(figures.rule_limits, candidate, rule)
    if gate.max_calibration_error is not None or candidate.metrics.get("calibration") is not None:
        yield "calibration", lambda: calibration(candidate, gate)
    if (min_accuracy := gate.min_accuracy) is not None:
        yield "accuracy", lambda: figures.figure(candidate, "adapter", "accuracy", min_accuracy)
    if look is not None:
        has_comparison = champion is not None and not against.is_same_adapter(candidate, champion)
        yield "looks", lambda: look_result(look, gate.sequence, has_comparison)
    yield "against the champion", lambda: against.against_the_champion(candidate, champion, compared, seed)
    yield "the champion's rows", lambda: against.on_the_champions_rows(candidate, champion, compared, seed)
    for rule in gate.rules:
        if rule.bound is not None:
            name = f"{rule.metric} against the champion"
            yield name, partial(against.rule_bound, candidate, champion, compared, rule, seed)
    yield "slices", lambda: against.slices(candidate, champion, gate, seed)
    for suite in candidate.required_suites:
        yield f"suite {suite}", partial(prompt_suite, candidate, champion, gate, suite)
    for task in candidate.required_benchmarks:
        yield f"benchmark {task}", partial(benchmark, candidate, champion, gate, task)
    if gate.judge.is_on:
        yield "judge", lambda: judged(candidate, champion, gate)
    yield "forgetting", lambda: forgetting(candidate, gate, seed)
    yield "adapter size", lambda: files.adapter_size(candidate, gate)
    yield "latency", lambda: figures.latency(candidate, gate)
    yield "merge fidelity", lambda: figures.merge_fidelity(candidate, merge)
    yield "approval", lambda: people.approval(candidate, gate)
