"""What the doctor found, kept with the data, so that training can refuse bad rows without looking at them again.

Nothing heavy is imported here: the train stage depends on this file and not on the checks, and a change in how a
finding is made does not by itself retrain a model. The files' digests say that the findings are about these rows.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flows.errors import DataError, StageError
from flows.paths import SPLITS, Paths
from peftcore.files import sha256

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One check's outcome. figure: what was found, in words; value: the number behind it; fix: what to do.

    examples: rows by their id, or pairs of them.
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
    """All outcomes, and the SHA-256 of each split that they are about."""

    findings: tuple[Finding, ...]
    examined: Mapping[str, str]

    def of(self, *severities: Severity) -> list[Finding]:
        """Those of these severities, in the severities' order."""
        return [finding for severity in severities for finding in self.findings if finding.severity == severity]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"examined": dict(self.examined), "findings": [asdict(finding) for finding in self.findings]}

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> "Findings":
        """What `as_dict` gave."""
        found = (Finding(**{**one, "examples": tuple(one["examples"])}) for one in given["findings"])
        return Findings(tuple(found), given["examined"])


def judged(
    check: str,
    figure: str,
    value: float,
    *,
    error: bool = False,
    warning: bool = False,
    fix: str,
    examples: tuple[str, ...] = (),
) -> Finding:
    """A finding of the worst severity that holds; one that is ok has no fix."""
    severity: Severity = "error" if error else "warning" if warning else "ok"
    if severity == "ok":
        return Finding(check, severity, figure, value)
    return Finding(check, severity, figure, value, fix, examples)


def require_sound(paths: Paths) -> Findings:
    """The findings on the prepared rows. Raises DataError if there is an error among them, naming all with their fix.

    Raises StageError if nothing was prepared, or if a split is not the one that was examined.
    """
    if not paths.data_report.exists():
        raise StageError(f"there is no {paths.data_report}; run the prepare stage first")
    report = json.loads(paths.data_report.read_text())
    if "doctor" not in report:
        raise StageError(f"{paths.data_report} has no findings of the doctor; run the prepare stage again")
    findings = Findings.from_dict(report["doctor"])
    for split in SPLITS:
        path = paths.split(split)
        if not path.exists() or findings.examined[split] != sha256(path):
            raise StageError(f"{path} is not what the doctor examined; run the prepare stage again")
    errors = findings.of("error")
    if errors:
        listed = "\n".join(f"  {finding}" for finding in errors)
        raise DataError(f"the data cannot be trained on; `peftcore doctor` shows its rows:\n{listed}")
    return findings
