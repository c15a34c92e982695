"""The growth benchmark measures each panel's points and draws them."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof

SMALL = ("--blocks", "1", "--deep-blocks", "2", "--ranks", "2,4", "--lengths", "16,32", "--adapted", "1,2")


def test_three_panels_a_table_and_a_picture(run_benchmark, tmp_path: Path) -> None:
    done = run_benchmark("growth", *SMALL, "--length", "16", "--batch", "1", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    panels = json.loads((tmp_path / "growth.json").read_text())["panels"]
    places = {panel: [point["at"] for point in points] for panel, points in panels.items()}
    assert places == {"rank": [2, 4], "length": [16, 32], "layers": [7, 14]}
    assert all(len(times) == 7 for points in panels.values() for p in points for times in p["all_ms"].values())
    assert "From 16 to 32, 2x: floor" in (tmp_path / "growth.md").read_text()
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_more_adapted_blocks_than_there_are_is_refused(run_benchmark) -> None:
    done = run_benchmark("growth", "--deep-blocks", "2", "--adapted", "1,4")
    assert done.returncode == 2
    assert "give --deep-blocks 4" in done.stderr
