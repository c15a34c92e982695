"""The promotion gate: ordered checks on a candidate; the first that fails stops, with its reason.

It reads the candidate's adapter folder and changes nothing. Losses are those of the test rows: mean nats per supervised
token, or of what the objective says. A threshold on a figure that an objective does not have is passed over, and the
check says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.params import Gate, Merge
from flows.promotion.adapter_files import foreign_files, non_finite_tensors
from peftcore.files import read_manifest, sha256

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Candidate:
    """What a version is judged by.

    name: of the model; adapter: its folder; files: {name: SHA-256} from when it was registered; metrics, merge: the
    JSON that evaluate and merge wrote; rows: evaluate's table with one row a test row (id, tokens, adapter_loss).
    """

    name: str
    version: str
    adapter: Path
    files: Mapping[str, str]
    metrics: Mapping[str, Any]
    merge: Mapping[str, Any]
    rows: "pyarrow.Table"


@dataclass(frozen=True)
class Champion:
    """The version that holds the stage now, and what it was judged by."""

    version: str
    evaluation_set: str
    base_model: str
    rows: "pyarrow.Table"
    loss_function: str | None = None
    """What its test loss is; None: it was registered before that was written down, when it was that of tokens."""


@dataclass(frozen=True)
class Check:
    """One check's outcome; detail: what was found and what is allowed."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class GateReport:
    """The checks that were made, in order; the last one is the reason where the gate refuses."""

    version: str
    champion: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str | None:
        """Why the candidate is refused; None if it is not."""
        failed = next((check for check in self.checks if not check.passed), None)
        return f"{failed.name}: {failed.detail}" if failed else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "reason": self.reason}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "GateReport":
        return cls(value["version"], value["champion"], tuple(Check(**check) for check in value["checks"]))


Outcome = tuple[bool, str]
TOKENS = "cross entropy of tokens"
"""The test loss of a run that does not say what it is."""


def evaluate_gate(candidate: Candidate, champion: Champion | None, gate: Gate, merge: Merge, seed: int) -> GateReport:
    """Judge a candidate. champion: None where the stage is free; merge: how faithful merging has to be.

    seed: of the bootstrap's resamples, so that the same two versions get the same verdict.
    """
    checks: list[tuple[str, Callable[[], Outcome]]] = [
        ("allowed files", lambda: _allowed_files(candidate)),
        ("manifest", lambda: _manifest(candidate)),
        ("finite weights", lambda: _finite(candidate)),
        ("test loss", lambda: _test_loss(candidate, gate)),
        ("gain in loss", lambda: _at_least(candidate.metrics["gain"]["loss"], gate.min_loss_gain, "nats")),
        ("gain in ROUGE-L", lambda: _figure(candidate, "gain", "rouge_l", gate.min_rouge_l_gain)),
        ("answers that end", lambda: _figure(candidate, "adapter", "ended", gate.min_ended)),
        ("against the champion", lambda: _against(candidate, champion, gate, seed)),
        ("slices", lambda: _slices(candidate, champion, gate, seed)),
        ("adapter size", lambda: _size(candidate, gate)),
        ("merge fidelity", lambda: _merge_fidelity(candidate, merge)),
    ]
    if gate.min_accuracy is not None:
        accuracy = ("accuracy", partial(_figure, candidate, "adapter", "accuracy", gate.min_accuracy))
        checks.insert([name for name, _ in checks].index("against the champion"), accuracy)
    made: list[Check] = []
    for name, check in checks:
        passed, detail = check()
        made.append(Check(name, passed, detail))
        if not passed:
            break
    return GateReport(candidate.version, champion.version if champion else None, tuple(made))


def _allowed_files(candidate: Candidate) -> Outcome:
    foreign = foreign_files(candidate.adapter)
    if foreign:
        return False, f"{', '.join(foreign)} may not be in an adapter folder; only safetensors weights are allowed"
    return True, "safetensors weights, their configuration and notes only"


def _manifest(candidate: Candidate) -> Outcome:
    if not candidate.files:
        return False, "the version was registered without the SHA-256 of its files; register it again"
    folder = candidate.adapter
    # the folder's own manifest could have been rewritten with its files; the registered one could not
    damaged = [
        name
        for name, digest in candidate.files.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
    if damaged or read_manifest(folder) != dict(candidate.files):
        names = ", ".join(damaged) or "SHA256SUMS"
        return False, f"{names} is not what was registered as {candidate.version}; run the pipeline again"
    return True, f"{len(candidate.files)} files have their registered SHA-256"


def _finite(candidate: Candidate) -> Outcome:
    bad, count = non_finite_tensors(candidate.adapter)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return False, f"NaN or infinity in {', '.join(bad[:3])}{more}"
    if count == 0:
        return False, "the adapter folder holds no weights"
    return True, f"{count} tensors"


def _test_loss(candidate: Candidate, gate: Gate) -> Outcome:
    loss = candidate.metrics["adapter"]["loss"]
    if gate.max_test_loss is None:
        return loss == loss, f"{loss:.3f} nats, no limit set"
    return loss <= gate.max_test_loss, f"{loss:.3f} nats, at most {gate.max_test_loss:g}"


def _at_least(value: float | None, limit: float, unit: str = "") -> Outcome:
    if value is None:
        return False, f"not measured, at least {limit:g} {unit}".rstrip()
    return value >= limit, f"{value:.3f}{unit and ' ' + unit}, at least {limit:g}"


FIGURES = {
    "sft": {"rouge_l", "ended"},
    "dpo": {"rouge_l", "ended", "accuracy"},
    "orpo": {"rouge_l", "ended", "accuracy"},
    "classification": {"accuracy"},
}
"""{objective: the figures beside the loss that its evaluation has}"""


def _figure(candidate: Candidate, part: str, name: str, limit: float) -> Outcome:
    objective = candidate.metrics.get("objective", "sft")
    if name not in FIGURES[objective]:
        return True, f"not checked: {objective} has no such figure (the limit of {limit:g} is for other objectives)"
    return _at_least(candidate.metrics[part].get(name), limit)


def _against(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> Outcome:
    from flows.promotion.bootstrap import paired_bootstrap, paired_losses

    if champion is None:
        return True, f"no {gate.stage} yet"
    for part, what in (("base_model", "base model"), ("evaluation_set", "test set")):
        if candidate.metrics[part] != getattr(champion, part):
            return False, (
                f"{champion.version} was measured on another {what}, so the two cannot be compared; run the "
                f"champion's parameters on this {what} first, or free the stage with "
                f"`gto deprecate {candidate.name} {champion.version} {gate.stage}`"
            )
    losses = [loss or TOKENS for loss in (candidate.metrics.get("loss_function"), champion.loss_function)]
    if losses[0] != losses[1]:
        return False, (
            f"its test loss is {losses[0]}, and that of {champion.version} is {losses[1]}, so the two cannot be "
            f"compared; free the stage with `gto deprecate {candidate.name} {champion.version} {gate.stage}`"
        )
    weights, ours, theirs, _ = paired_losses(candidate.rows, champion.rows)
    if len(weights) == 0:
        return False, f"{champion.version} was measured on other test rows; evaluate both on the same rows"
    rule = gate.champion
    mean, upper = paired_bootstrap(weights, ours, theirs, rule.confidence, rule.resamples, seed)
    return upper <= rule.max_loss_regression, (
        f"loss {mean:+.4f} nats against {champion.version} on {len(weights)} rows, {rule.confidence:.0%} upper "
        f"bound {upper:+.4f}, at most {rule.max_loss_regression:g}"
    )


def _slices(candidate: Candidate, champion: Champion | None, gate: Gate, seed: int) -> Outcome:
    from flows.promotion.slices import slice_differences

    rule = gate.slices
    if champion is None:
        return True, f"no {gate.stage} yet"
    if rule.max_loss_regression is None:
        return True, "no limit set"
    allowed = f"at most {rule.max_loss_regression:g}"
    found = slice_differences(candidate.rows, champion.rows, rule, gate.champion.resamples, seed)
    worse = [one for one in found if one.is_worse]
    if worse:
        told = "; ".join(f"{one.name} {one.mean:+.3f} nats on {one.rows} rows (p {one.p:.4f})" for one in worse[:3])
        more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
        return False, f"worse than {champion.version} in {told}{more}, {allowed}"
    largest = max(found, key=lambda one: one.mean)
    return True, (
        f"none of {len(found)} worse than allowed; the largest difference is {largest.name} {largest.mean:+.3f} nats "
        f"on {largest.rows} rows, {allowed}"
    )


def _size(candidate: Candidate, gate: Gate) -> Outcome:
    size = sum(file.stat().st_size for file in candidate.adapter.rglob("*") if file.is_file()) / 1e6
    if gate.max_adapter_mb is None:
        return True, f"{size:.1f} MB, no limit set"
    return size <= gate.max_adapter_mb, f"{size:.1f} MB, at most {gate.max_adapter_mb:g}"


def _merge_fidelity(candidate: Candidate, merge: Merge) -> Outcome:
    divergence, agreement = candidate.merge["kl"], candidate.merge["top1_agreement"]
    return divergence <= merge.max_kl and agreement >= merge.min_top1_agreement, (
        f"KL {divergence:.4f} nats, at most {merge.max_kl:g}; "
        f"first choices agree on {agreement:.1%}, at least {merge.min_top1_agreement:.0%}"
    )
