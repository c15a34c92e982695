"""The promotion gate: ordered checks on a candidate; it refuses with every reason that it has found.

Where the candidate's files are not what was registered, nothing else is looked at, for all other checks read them. All
limits on its figures are checked. It is compared with the champion, which may mean to measure again, only if it is
within them.

The gate reads the candidate's adapter folder and changes nothing. Losses are those of the test rows: mean nats per
supervised token, or of what the objective says.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from flows.gate.candidate import Candidate, Champion, Outcome
from flows.gate.checks import champion as against
from flows.gate.checks import figures, files, people
from flows.gate.checks.evidence import evidence
from flows.gate.checks.forgetting import forgetting
from flows.gate.checks.measured import measured_as_asked
from flows.params import Gate, Merge

DECISIVE = frozenset(
    ("not taken back", "allowed files", "manifest", "evidence", "measured as asked", "signature", "finite weights")
)
"""Checks of what the others read; after one that fails no other is made."""
COMPARING = frozenset(("against the champion", "the champion's rows", "slices"))
"""Checks against the champion, made only while no other has failed."""


@dataclass(frozen=True)
class Check:
    """One check's outcome; detail: what was found and what is allowed."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class GateReport:
    """The checks that were made, in order."""

    version: str
    champion: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str | None:
        """Every check that the candidate fails, with its detail; None if it passes all."""
        failed = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        return "; ".join(failed) or None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "reason": self.reason}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "GateReport":
        return cls(value["version"], value["champion"], tuple(Check(**check) for check in value["checks"]))


def evaluate_gate(candidate: Candidate, champion: Champion | None, gate: Gate, merge: Merge, seed: int) -> GateReport:
    """Judge a candidate. champion: None where the stage is free; merge: how faithful merging has to be.

    seed: of the bootstrap's resamples, so that the same two versions get the same verdict.
    """
    checks: list[tuple[str, Callable[[], Outcome]]] = [
        ("not taken back", lambda: people.not_taken_back(candidate, gate)),
        ("allowed files", lambda: files.allowed_files(candidate)),
        ("manifest", lambda: files.manifest(candidate)),
        ("evidence", lambda: evidence(candidate)),
        ("measured as asked", lambda: measured_as_asked(candidate)),
        ("signature", lambda: people.signature(candidate, gate)),
        ("finite weights", lambda: files.finite_weights(candidate)),
        ("test loss", lambda: figures.test_loss(candidate, gate)),
        ("gain in loss", lambda: figures.gain_in_loss(candidate, gate)),
        ("gain in ROUGE-L", lambda: figures.figure(candidate, "gain", "rouge_l", gate.min_rouge_l_gain)),
        ("answers that end", lambda: figures.ended(candidate, gate)),
        ("against the champion", lambda: against.against_the_champion(candidate, champion, gate, seed)),
        ("the champion's rows", lambda: against.on_the_champions_rows(candidate, champion, gate, seed)),
        ("slices", lambda: against.slices(candidate, champion, gate, seed)),
        ("forgetting", lambda: forgetting(candidate, gate, seed)),
        ("adapter size", lambda: files.adapter_size(candidate, gate)),
        ("latency", lambda: figures.latency(candidate, gate)),
        ("merge fidelity", lambda: figures.merge_fidelity(candidate, merge)),
        ("approval", lambda: people.approval(candidate, gate)),
    ]
    if gate.min_accuracy is not None:
        accuracy = ("accuracy", partial(figures.figure, candidate, "adapter", "accuracy", gate.min_accuracy))
        checks.insert([name for name, _ in checks].index("against the champion"), accuracy)
    made: list[Check] = []
    for name, check in checks:
        refused = not all(each.passed for each in made)
        if refused and name in COMPARING:
            continue
        made.append(Check(name, *check()))
        if name in DECISIVE and not made[-1].passed:
            break
    return GateReport(candidate.version, champion.version if champion else None, tuple(made))
