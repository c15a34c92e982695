"""Findings of the validation, stored with the data, so that training can refuse invalid rows without checking again.

This module imports nothing heavy: the train stage depends on this file and not on the checks, so a change of a check
retrains no model. The files' digests tie the findings to the rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flows.errors import DataError, StageError
from flows.paths import SPLITS, Paths, prepare_command
from peftcore.files import sha256

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    figure: the result in words; value: the number behind it; fix: what to do; examples: ids of rows, or pairs of ids.
    """

    check: str
    severity: Severity
    figure: str
    value: float
    fix: str = ""
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.check}: {self.figure}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Findings:
    """All results, and the SHA-256 of each checked split."""

    findings: tuple[Finding, ...]
    examined: Mapping[str, str]

    def of(self, *severities: Severity) -> list[Finding]:
        """Return the findings of these severities, ordered by severity as given."""
        return [finding for severity in severities for finding in self.findings if finding.severity == severity]

    def plus(self, further: Sequence[Finding]) -> "Findings":
        """Return these findings and further ones."""
        return Findings((*self.findings, *further), self.examined)

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return {"examined": dict(self.examined), "findings": [asdict(finding) for finding in self.findings]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Findings":
        """Build findings from the values of `as_dict`."""
        findings = (Finding(**{**one, "examples": tuple(one["examples"])}) for one in values["findings"])
        return Findings(tuple(findings), values["examined"])


def make_finding(
    check: str,
    figure: str,
    value: float,
    *,
    error: bool = False,
    warning: bool = False,
    fix: str,
    examples: tuple[str, ...] = (),
) -> Finding:
    """Return a finding with the worst severity that applies; a finding that is ok has no fix."""
    severity: Severity = "error" if error else "warning" if warning else "ok"
    if severity == "ok":
        return Finding(check, severity, figure, value)
    return Finding(check, severity, figure, value, fix, examples)


def require_valid(paths: Paths) -> Findings:
    """Return the findings on the prepared rows.

    Raises:
        DataError: There is an error among them; the message lists all errors with their fixes.
        StageError: Nothing was prepared, or a split changed after the checks.
    """
    if not paths.data_report.exists():
        raise StageError(f"there is no {paths.data_report}; run `{prepare_command(paths.root)}` first")
    report = json.loads(paths.data_report.read_text(encoding="utf-8"))
    if "doctor" not in report:
        raise StageError(
            f"{paths.data_report} has no findings of `peftcore doctor`; run `peftcore stage prepare` again"
        )
    findings = Findings.from_dict(report["doctor"])
    for split in SPLITS:
        path = paths.split(split)
        if not path.exists() or findings.examined[split] != sha256(path):
            raise StageError(f"{path} changed after `peftcore doctor` checked it; run `peftcore stage prepare` again")
    errors = findings.of("error")
    if errors:
        listed = "\n".join(f"  {finding}" for finding in errors)
        raise DataError(f"the data cannot be trained on; `peftcore doctor` shows the rows:\n{listed}")
    return findings
