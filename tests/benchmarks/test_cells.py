"""Cells that are kept, and what pairs of them say."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.cells import measure_missing, paired, read, there, verdict


def test_differences_are_paired_by_seed_and_weighed() -> None:
    theirs = [[2.0, 1.0], [3.0, 1.0], [4.0, 1.0]]
    found = paired([[loss + d for loss in row] for row, d in zip(theirs, (0.1, 0.2, 0.3), strict=True)], theirs, [1, 3])
    assert found["by_seed"] == pytest.approx([0.1, 0.2, 0.3]) and found["difference"] == pytest.approx(0.2)
    # Student's t of two degrees of freedom: 4.303 · 0.1 / √3
    assert found["over_seeds"] == pytest.approx([0.2 - 0.2484, 0.2 + 0.2484], abs=1e-4)
    assert found["over_rows"] == pytest.approx([0.2, 0.2])  # every row differs alike
    uneven = paired([[2.0, 1.4], [3.0, 1.4]], [[2.0, 1.0], [3.0, 1.0]], [1, 3])
    assert uneven["difference"] == pytest.approx(0.3)  # three tokens out of four
    low, high = uneven["over_rows"]
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(0.4)  # of two rows, either may be drawn twice


@pytest.mark.parametrize(
    ("over_seeds", "over_rows", "said"),
    [
        ((-0.01, 0.015), (0.001, 0.01), "equal within the margin"),
        ((0.005, 0.05), (0.01, 0.03), "worse"),
        ((-0.05, -0.03), (-0.04, -0.01), "better"),
        ((-0.05, 0.05), (0.01, 0.03), "not decided"),
        ((-0.05, 0.05), (-0.03, -0.01), "not decided"),
    ],
)
def test_a_verdict_needs_both_intervals(over_seeds: tuple[float, ...], over_rows: tuple[float, ...], said: str) -> None:
    one = {"over_seeds": over_seeds, "over_rows": over_rows}
    assert verdict(one, margin=0.02) == said
    assert verdict(one) == said if "equal" not in said else "not decided"


def test_cells_are_measured_once_in_each_setting(tmp_path: Path) -> None:
    options = Namespace(cells=tmp_path, only=None, missing=False, draw=False)
    seen: list[str] = []

    def measure(name: str) -> dict[str, str]:
        seen.append(name)
        return {"found": name}

    assert measure_missing(options, ["a-0", "b-0"], {"rows": 1}, measure) and seen == ["a-0", "b-0"]
    assert measure_missing(options, ["a-0", "b-0", "c-0"], {"rows": 1}, measure) and seen == ["a-0", "b-0", "c-0"]
    assert there(options, ["a-0", "d-0"], {"rows": 1})["a-0"]["found"] == "a-0"
    assert read(tmp_path, "a-0", {"rows": 2}) is None
    options.only = "a-0"
    assert not measure_missing(options, ["a-0", "b-0"], {"rows": 2}, measure) and seen[-1:] == ["a-0"]


def test_missing_cells_are_named_and_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Namespace(cells=tmp_path, only=None, missing=True, draw=False)
    assert not measure_missing(options, ["a-0", "b-0"], {}, lambda name: pytest.fail(name))
    assert capsys.readouterr().out == "a-0\nb-0\n"
