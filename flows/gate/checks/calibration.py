"""Check of the expected calibration error: of the classes of a classifier, or of the tokens of a language model."""

from flows.gate.candidate import Candidate, CheckResult
from flows.gate.checks.figures import within
from flows.params import Gate


def calibration(candidate: Candidate, gate: Gate) -> CheckResult:
    """Check the adapter's expected calibration error against its limit."""
    measured = candidate.metrics.get("calibration")
    passed, detail = within(measured and measured["adapter"]["ece"], gate.max_calibration_error, "lower")
    if measured is None:
        return passed, f"{detail}; set evaluate.calibration_rows and run the pipeline again"
    ours, base = measured["adapter"], measured["base"]
    note = f"base {base['ece']:.3f}; Brier score {ours['brier']:.3f}, base {base['brier']:.3f}"
    return passed, f"{detail}; {note}; {ours['predictions']:,} predictions"
