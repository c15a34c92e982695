"""The train-step benchmark runs and checks what it compares; how fast anything is, is no test."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ("--blocks", "1", "--batch", "1", "--length", "24", "--repeats", "7", "--dtype", "fp32")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train_step", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_three_rows_and_the_machine(tmp_path: Path) -> None:
    done = run(*SMALL, "--dropout", "0.1", "--loss", "supervised", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[2:5]}
    assert list(rows) == ["floor", "ours", "PEFT"]
    assert rows["floor"][2] == rows["PEFT"][3] == "1.00"
    assert int(rows["floor"][4]) <= int(rows["ours"][4])
    assert re.search(r"\d+ of \d+ cores in use.*torch \d", done.stdout)


def test_too_few_repeats_are_refused(tmp_path: Path) -> None:
    done = run("--repeats", "3", cwd=tmp_path)
    assert done.returncode == 2
    assert "at least 7" in done.stderr
