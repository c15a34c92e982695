"""Simulated years of weekly candidates."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from scipy.stats import binom

from benchmarks.looks import SEQUENCES, Judge


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"draws": 10, "rows": 100, "deviation": 0.2, "resamples": 500, "skip": 0.75} | changes)


def test_a_skipped_bootstrap_would_have_refused() -> None:
    quick, whole = (Judge(options(skip=skip), None) for skip in (0.75, 0.0))
    generator = numpy.random.default_rng(0)
    weights = numpy.ones(100)
    draws = [generator.normal(-0.02, 0.2, 100) for _ in range(200)]
    verdicts = [[judge.promotes(1, weights, draw, seed) for seed, draw in enumerate(draws)] for judge in (quick, whole)]
    assert verdicts[0] == verdicts[1] and 10 < sum(verdicts[0]) < 100
    assert quick.skipped > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["even", "decreasing"])
def test_a_year_has_a_false_promotion_in_at_most_the_stated_share(name: str) -> None:
    """Without control it has one in nearly nine of ten years."""
    judge = Judge(options(rows=400), SEQUENCES[name])
    assert sum(judge.year(number) for number in range(100)) <= binom.ppf(0.9999, 100, 0.05)
    off = Judge(options(rows=400), None)
    assert sum(off.year(number) for number in range(20)) >= 10


@pytest.mark.slow
def test_the_program_writes_a_table(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    result = run_benchmark("looks", "--years", "2", "--draws", "4", "--rows", "60", "--folder", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "looks.md").read_text() in result.stdout + "\n"
    measured = json.loads((tmp_path / "looks.json").read_text())
    assert set(SEQUENCES) < set(measured) and measured["even"]["no_gain"] <= 2
