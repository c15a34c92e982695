"""The promotion gate: ordered checks of a candidate. A refusal names every check that failed.

If the candidate's files differ from the registered ones, no further check is made, because all other checks read these
files. All limits on the candidate's own figures are checked. The comparison with the champion, which may need a
re-evaluation, is made only if the candidate is within those limits.

The gate reads the candidate's adapter folder and changes nothing. Losses are losses of test rows: mean nats per
supervised token, or the unit of the objective.
"""

from collections.abc import Callable, Mapping
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
    look, compared = candidate.look, at_look(gate, candidate.look)
    rules = [rule for rule in gate.rules if rule.limit is not None or rule.gain is not None]
    bounds = {f"{rule.metric} against the champion": rule for rule in gate.rules if rule.bound is not None}
    checks: list[tuple[str, Callable[[], CheckResult | ResultWithFigures]]] = [
        ("not withdrawn", lambda: people.not_withdrawn(candidate, gate)),
        ("allowed files", lambda: files.allowed_files(candidate)),
        ("manifest", lambda: files.manifest(candidate)),
        ("evidence", lambda: evidence(candidate)),
        ("evaluation settings", lambda: evaluation_settings(candidate)),
        ("signature", lambda: people.signature(candidate, gate)),
        ("finite weights", lambda: files.finite_weights(candidate)),
        ("test loss", lambda: figures.test_loss(candidate, gate)),
        ("gain in loss", lambda: figures.gain_in_loss(candidate, gate)),
        ("gain in ROUGE-L", lambda: figures.figure(candidate, "gain", "rouge_l", gate.min_rouge_l_gain)),
        ("EOS rate", lambda: figures.eos_rate(candidate, gate)),
        *((f"rule on {rule.metric}", partial(figures.rule_limits, candidate, rule)) for rule in rules),
        ("against the champion", lambda: against.against_the_champion(candidate, champion, compared, seed)),
        ("the champion's rows", lambda: against.on_the_champions_rows(candidate, champion, compared, seed)),
        *(
            (name, partial(against.rule_bound, candidate, champion, compared, rule, seed))
            for name, rule in bounds.items()
        ),
        ("slices", lambda: against.slices(candidate, champion, gate, seed)),
        *(
            (f"suite {name}", partial(prompt_suite, candidate, champion, gate, name))
            for name in candidate.required_suites
        ),
        *(
            (f"benchmark {name}", partial(benchmark, candidate, champion, gate, name))
            for name in candidate.required_benchmarks
        ),
        *([("judge", lambda: judged(candidate, champion, gate))] if gate.judge.is_on else []),
        ("forgetting", lambda: forgetting(candidate, gate, seed)),
        ("adapter size", lambda: files.adapter_size(candidate, gate)),
        ("latency", lambda: figures.latency(candidate, gate)),
        ("merge fidelity", lambda: figures.merge_fidelity(candidate, merge)),
        ("approval", lambda: people.approval(candidate, gate)),
    ]
    if gate.max_calibration_error is not None or candidate.metrics.get("calibration") is not None:
        places = [name for name, _ in checks]
        checks.insert(places.index("against the champion"), ("calibration", lambda: calibration(candidate, gate)))
    if gate.min_accuracy is not None:
        accuracy = ("accuracy", partial(figures.figure, candidate, "adapter", "accuracy", gate.min_accuracy))
        checks.insert([name for name, _ in checks].index("against the champion"), accuracy)
    if look is not None:
        has_comparison = champion is not None and not against.is_same_adapter(candidate, champion)
        sequence = ("looks", lambda: look_result(look, gate.sequence, has_comparison))
        checks.insert([name for name, _ in checks].index("against the champion"), sequence)
    results: list[Check] = []
    for name, check in checks:
        refused = not all(each.passed for each in results)
        if refused and (name in COMPARING or name in bounds or name.startswith(("suite ", "benchmark "))):
            continue
        passed, detail, *further = check()
        results.append(Check(name, passed, detail, further[0] if further else None))
        if name in DECISIVE and not results[-1].passed:
            break
    return GateReport(candidate.version, champion.version if champion else None, tuple(results))
