"""The routing benchmark, on two blocks: every case is measured, and its table and picture are written."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof

SMALL = ("--blocks", "2", "--dtypes", "fp32", "--modes", "decode", "--repeats", "3", "--growth")


def test_every_case_is_measured(run_benchmark, tmp_path: Path) -> None:
    done = run_benchmark("routing", *SMALL, "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "routing.json").read_text())
    assert list(measured["cases"]) == [f"decode {case} fp32" for case in ("1 for all", "4", "16", "disabled")]
    assert all(found["floor"]["floor"] == 1 and found["PEFT"]["ms"] > 0 for found in measured["cases"].values())
    rows = [line for line in (tmp_path / "routing.md").read_text().splitlines() if line.startswith("| decode")]
    assert len(rows) == 4
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    again = run_benchmark("routing", "--draw", "--folder", str(tmp_path))
    assert again.returncode == 0 and rows[0] in again.stdout


def test_too_few_rounds_are_refused(run_benchmark) -> None:
    done = run_benchmark("routing", "--repeats", "1")
    assert done.returncode == 2 and "a median of 1 says little; give at least 3" in done.stderr
