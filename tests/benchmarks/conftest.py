"""Benchmarks are programs, so they are tested as programs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m benchmarks.NAME` with arguments, in an empty folder."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *arguments]
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": os.environ["PATH"],  # the C++ compiler
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run
