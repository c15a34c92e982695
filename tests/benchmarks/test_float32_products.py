"""The benchmark of float32 products measures both libraries and ours, and their rounding."""

from pathlib import Path

import pytest

from peftcore.bases.onednn import is_usable


@pytest.mark.proof
@pytest.mark.skipif(not is_usable(), reason="this PyTorch does not contain oneDNN's product")
def test_a_line_for_each_number_of_rows(run_benchmark, tmp_path: Path) -> None:
    done = run_benchmark("float32_products", "--rows", "1,65", "--repeats", "7", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "float32_products.md").read_text().splitlines()
    assert sum(line.startswith(("| 1 |", "| 65 |")) for line in lines) == 2
    assert any(line.startswith("Rounding for 32 rows") for line in lines)
