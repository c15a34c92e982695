"""`make` explains itself and starts nothing."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()


def make(*arguments: str) -> str:
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_bare_make_prints_every_target_with_one_line() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    described = [re.fullmatch(r"make (\w+) +(\S.*)", line) for line in make("--no-print-directory").splitlines()]
    assert all(described)
    assert sorted(line[1] for line in described if line) == sorted(phony[1].split())


def test_bare_make_runs_help_alone() -> None:
    assert make("--dry-run", "--no-print-directory") == make("--dry-run", "--no-print-directory", "help")
    assert "peftcore run" in make("--dry-run", "run")
