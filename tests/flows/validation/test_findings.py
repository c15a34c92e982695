"""Findings are kept with the data, and training refuses rows with an error or rows that nobody looked at."""

import json
from typing import Any

import pytest

from flows.errors import DataError, StageError
from flows.paths import Paths
from flows.validation.findings import Findings, make_finding, require_valid


def kept(patient: Any) -> Paths:
    """The findings as prepare keeps them."""
    report = patient.report | {"doctor": patient.examine().as_dict()}
    (patient.folder / "report.json").write_text(json.dumps(report))
    return Paths(patient.folder.parents[1])


def test_healthy_rows_are_let_through(patient: Any) -> None:
    healthy = patient()
    assert require_valid(kept(healthy)) == healthy.examine()


def test_an_error_stops_with_its_figure_and_its_fix(patient: Any) -> None:
    ill = patient()
    ill.change("train", "labels", lambda rows: [[*row[:-1], -100] for row in rows])
    with pytest.raises(DataError, match=r"cannot be trained on; `peftcore doctor`(?s:.)*end of turn: .*never stops"):
        require_valid(kept(ill))


def test_a_warning_does_not_stop(patient: Any) -> None:
    ill = patient()
    ill.change("train", "weight", lambda rows: [0.0, *rows[1:]])
    assert [finding.check for finding in require_valid(kept(ill)).of("error", "warning")] == ["weights"]


def test_rows_that_were_changed_since_are_refused(patient: Any) -> None:
    ill = patient()
    paths = kept(ill)
    ill.change("test", "weight", lambda rows: [2.0] * len(rows))
    with pytest.raises(StageError, match=r"test\.parquet changed after `peftcore doctor` checked it"):
        require_valid(paths)


@pytest.mark.parametrize("report", [None, "{}"])
def test_rows_that_nobody_looked_at_are_refused(patient: Any, report: str | None) -> None:
    paths = Paths(patient().folder.parents[1])
    if report is not None:
        paths.data_report.write_text(report)
    with pytest.raises(StageError, match=r"run `(dvc repro (.*:)?prepare|peftcore stage prepare)`"):
        require_valid(paths)


def test_json_keeps_all_of_a_finding() -> None:
    finding = make_finding("check", "figure", 0.5, warning=True, fix="do it", examples=("a",))
    findings = Findings((finding,), {"train": "1"})
    assert Findings.from_dict(json.loads(json.dumps(findings.as_dict()))) == findings


def test_the_worst_that_holds_is_the_severity() -> None:
    assert make_finding("c", "f", 1, error=True, warning=True, fix="x").severity == "error"
    assert make_finding("c", "f", 0, fix="x").fix == ""
