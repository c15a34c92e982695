"""Freed memory that a process keeps: measured by the page faults of allocating it again."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """\
import resource
from flows.runtime.allocator import keep_freed_memory

print(keep_freed_memory())
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block[::4096]))
    del block
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(after - before)
"""
PAGES = (64 << 20) // 4096
GLIBC = platform.libc_ver()[0] == "glibc"


def measured(**variables: str) -> tuple[str, int]:
    """Return whether memory was said to be kept, and the page faults of the third of three allocations of 64 MiB."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True)
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_memory_that_was_freed_is_there_for_the_next_allocation() -> None:
    said, faults = measured()
    assert said == "True" and faults < PAGES / 100


@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}],
)
@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_what_the_environment_sets_stays(variables: dict[str, str]) -> None:
    said, faults = measured(**variables)
    assert said == "False" and faults > PAGES / 2


@pytest.mark.skipif(GLIBC, reason="glibc is here")
def test_another_c_library_is_left_alone() -> None:
    assert measured()[0] == "False"
