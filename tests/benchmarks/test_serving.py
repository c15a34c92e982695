"""The benchmark of the server runs; how fast it is is no test."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof


def test_four_cases_of_a_tiny_server(run_benchmark, tiny_base: Path, tmp_path: Path) -> None:
    small = ("--rounds", "1", "--requests", "1", "--prompt", "8", "--tokens", "4", "--base", str(tiny_base))
    done = run_benchmark("serving", *small, "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^\| ([\w ,]+) \| (\d+) \| [\d.]+ \| [\d.]+ \(", (tmp_path / "serving.md").read_text(), re.MULTILINE
    )
    assert rows == [
        ("the base alone", "16"),
        ("1 adapter", "16"),
        ("16 adapters", "16"),
        ("16 adapters, one client", "1"),
    ]


def test_a_base_without_a_tokenizer_is_refused(run_benchmark, tmp_path: Path) -> None:
    done = run_benchmark("serving", "--base", str(tmp_path))
    assert done.returncode == 2
    assert "holds no tokenizer.json" in done.stderr
