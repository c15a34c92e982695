"""The benchmark of the server runs; how fast it is is no test."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof


def test_every_case_of_a_tiny_server(run_benchmark, tiny_base: Path, tmp_path: Path) -> None:
    small = ("--rounds", "1", "--requests", "1", "--prompt", "8", "--tokens", "4", "--no-peer")
    done = run_benchmark("serving", *small, "--base", str(tiny_base), "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([\w ,']+) \| (\d+) \| [\d.]+ \| ", (tmp_path / "serving.md").read_text(), re.MULTILINE)
    assert rows == [
        ("a loop of the base's forward, 16 rows", "16"),
        ("the base alone", "16"),
        ("1 adapter", "16"),
        ("16 adapters", "16"),
        ("1 adapter, a system prompt of 192 tokens", "16"),
        ("16 adapters, one client", "1"),
    ]


def test_a_base_without_a_tokenizer_is_refused(run_benchmark, tmp_path: Path) -> None:
    done = run_benchmark("serving", "--base", str(tmp_path))
    assert done.returncode == 2
    assert "holds no tokenizer.json" in done.stderr
