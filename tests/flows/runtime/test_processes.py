"""A process ends with its parent, also where the system has no `prctl`."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]

CHILD = """
import os, sys, time
from flows.runtime import processes
processes._PRCTL = None  # as on macOS
processes.watch_parent(seconds=0.05)
print(os.getpid(), flush=True)
time.sleep(300)
"""


@pytest.mark.slow
def test_a_process_ends_with_its_parent_without_prctl() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert child.is_running()
        process.kill()
    child.wait(timeout=60)


def test_a_process_goes_on_while_its_parent_lives() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        assert process.poll() is None
        process.kill()
