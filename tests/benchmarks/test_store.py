"""The store's benchmark, on two blocks and few adapters: hits and misses are told apart, and both stores are timed."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof


def test_requests_are_served_and_counted(run_benchmark, tmp_path: Path) -> None:
    sizes = ("--blocks", "2", "--registered", "12", "--requests", "40", "--loaded", "3", "12", "--peft", "2")
    done = run_benchmark("store", *sizes, "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "store.json").read_text())
    few, all_of_them = measured["runs"]
    assert few["hit_rate"] < all_of_them["hit_rate"] < 1 and few["evictions"] > all_of_them["evictions"] == 0
    assert few["adapter_bytes"] < all_of_them["adapter_bytes"] and measured["peft_ms"] > 0
    assert "12 registered adapters" in (tmp_path / "store.md").read_text()


def test_nothing_to_serve_is_refused(run_benchmark) -> None:
    done = run_benchmark("store", "--registered", "0")
    assert done.returncode == 2 and "give at least 1 of each" in done.stderr
