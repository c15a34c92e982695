"""Peak memory is this process's own and never falls."""

import subprocess
import sys
from pathlib import Path

from benchmarks.memory import peak_rss


def test_it_sees_what_was_held_and_given_back() -> None:
    before = peak_rss()
    size = before + 2**26
    held = bytearray(b"\1") * size
    assert peak_rss() > size
    del held
    assert peak_rss() > size


def test_a_child_does_not_inherit_it() -> None:
    held = bytearray(b"\1") * 2**29
    code = "from benchmarks.memory import peak_rss; print(peak_rss())"
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(held) / 4
