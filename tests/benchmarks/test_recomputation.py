"""The benchmark of recomputation runs, and its bytes come in the order that the modes promise."""

from pathlib import Path

import pytest


@pytest.mark.proof
def test_a_table_of_what_each_mode_keeps(run_benchmark, tmp_path: Path) -> None:
    done = run_benchmark("recomputation", "--blocks", "2", "--repeats", "1", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "recomputation.md").read_text()
    assert report in done.stdout
    rows = [[cell.strip() for cell in line.split("|")] for line in report.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 8
    for shape in (rows[:4], rows[4:]):
        shares = {cells[2]: float(cells[4]) for cells in shape}
        assert shares["none"] == 1 > shares["selective"] > shares["blocks"]
        assert shares["none"] > shares["feed-forward modules"] > shares["blocks"]
