"""The benchmark of `torch.compile` runs; whether compiling pays is no test."""

import re
import shutil
from pathlib import Path

import pytest


@pytest.mark.proof
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_three_rows_as_they_are_and_compiled(run_benchmark, tmp_path: Path) -> None:
    small = ("--blocks", "2", "--batch", "1", "--length", "24", "--repeats", "7")
    done = run_benchmark("compiled", *small, "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "compiled.md").read_text()
    rows = re.findall(r"^\| (\w+) \| \d+ \| \d+ \| \d+\.\d\d \| \d+ \|$", report, re.MULTILINE)
    assert rows == ["floor", "ours", "PEFT"]
