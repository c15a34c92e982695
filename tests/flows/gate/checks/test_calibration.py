"""The gate's check of the expected calibration error."""

from collections.abc import Callable
from dataclasses import replace

from gate_cases import check, judge, reason

from flows.gate.candidate import Candidate

SIDE = {"brier": 0.3, "predictions": 1200, "bins": []}
MEASURED = {"base": SIDE | {"ece": 0.2}, "adapter": SIDE | {"ece": 0.06}}


def test_the_error_is_compared_with_its_limit(make: Callable[..., Candidate]) -> None:
    good = make(calibration=MEASURED)
    good = replace(good, record={**good.record, "metrics": {**good.record["metrics"], "calibration": MEASURED}})
    assert judge(good, max_calibration_error=0.06).passed
    refused = judge(good, max_calibration_error=0.05)
    assert reason(refused).startswith("calibration: 0.060, at most 0.05; base 0.200; Brier score 0.300")
    assert check(judge(good), "calibration").startswith("0.060, no limit set")


def test_what_was_not_measured_fails_a_limit_alone(make: Callable[..., Candidate]) -> None:
    good = make()
    assert "calibration" not in [one.name for one in judge(good).checks]
    refused = reason(judge(good, max_calibration_error=0.1))
    assert refused == "calibration: not measured, at most 0.1; set evaluate.calibration_rows and run the pipeline again"
