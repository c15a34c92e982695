"""A lock between threads and processes: one holder at a time, and none after its process has ended."""

import fcntl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.runtime.locks import exclusive, exclusive_if_free, shared

HOLD = "import sys\nfrom pathlib import Path\nfrom flows.runtime.locks import exclusive\n"
HOLD += "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
"""Holds a lock until its input ends."""


def is_free(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_lock_is_held_while_its_context_is_open_also_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "lock"
    with exclusive(path):
        assert not is_free(path)
    assert is_free(path)
    with pytest.raises(ZeroDivisionError), exclusive(path):
        raise ZeroDivisionError
    assert is_free(path)


def test_of_many_that_count_at_once_none_is_lost(tmp_path: Path) -> None:
    count, lock = tmp_path / "count", tmp_path / "lock"
    count.write_text("0")

    def add(_: int) -> None:
        with exclusive(lock):
            before = int(count.read_text())
            count.write_text(str(before + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(80)))
    assert count.read_text() == "80"


def test_a_lock_is_free_once_its_process_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert not is_free(path)
        process.kill()
    with exclusive(path):
        assert not is_free(path)


def test_shared_holders_hold_a_lock_together_and_keep_out_an_exclusive_one(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "lock"
    with shared(path), shared(path):
        with exclusive_if_free(path) as is_mine:
            assert not is_mine
        assert not is_free(path)
    with exclusive_if_free(path) as is_mine:
        assert is_mine and not is_free(path)
        with exclusive_if_free(path) as second:
            assert not second
    assert is_free(path)
