"""The benchmark of the 4-bit forward measures both of bitsandbytes' products and ours."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest


@pytest.mark.proof
@pytest.mark.skipif(not bnb.has_avx512bf16(), reason="this CPU has no bfloat16 instructions, so there is one product")
def test_a_table_for_each_dtype(run_benchmark, tmp_path: Path) -> None:
    done = run_benchmark("quantised_forward", "--tokens", "1,32", "--repeats", "7", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "quantised_forward.md").read_text().splitlines()
    assert sum(line.startswith(("| 1 |", "| 32 |")) for line in lines) == 4
    assert any("first token after a prompt" in line for line in lines)
