"""A process ends with its parent, also where the system has no `prctl`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.runtime import processes
from flows.runtime.processes import is_alive, is_noted_alive, start_time, this_host

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


@pytest.mark.parametrize(
    ("here", "noted", "alive"),
    [
        ("vm/machine/boot", "vm/machine/boot", True),
        ("vm/machine/boot", "vm/machine/earlier", False),  # rebooted
        ("vm/machine/boot", "vm/other/boot", None),
        ("vm/machine/boot", "other/machine/boot", None),
        ("pod/container", "pod/earlier", None),  # the same name in another container, perhaps on another machine
        ("pod/container", "pod/machine/boot", None),
    ],
)
def test_a_process_of_an_earlier_boot_has_ended_and_one_of_another_machine_is_unknown(
    here: str, noted: str, alive: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "this_host", lambda: here)
    assert is_noted_alive({"pid": os.getpid(), "host": noted}) is alive


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the start of a process does not move with the clock")
@pytest.mark.parametrize("seconds", [-86400, -1, 1, 3600])
def test_a_process_is_known_after_the_clock_was_set(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from psutil import _pslinux

    note = start_time(psutil.Process())
    assert is_alive(os.getpid(), note)
    boot = int(_pslinux.boot_time()) + seconds  # `btime` of /proc/stat, which follows the clock
    monkeypatch.setattr(_pslinux, "boot_time", lambda: float(boot))
    monkeypatch.setattr(_pslinux, "BOOT_TIME", float(boot), raising=False)  # psutil before 7.1
    assert is_alive(os.getpid(), note)
    assert not is_alive(os.getpid(), note - 0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a boot id")
def test_the_host_of_a_note_names_the_boot_apart_from_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"/proc/sys/kernel/random/boot_id": "first boot", "/etc/machine-id": "this machine"}
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in contents)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: contents[str(path)])
    monkeypatch.setattr(Path, "readlink", lambda path: Path("pid:[4026531836]"))
    first = this_host.__wrapped__()
    contents["/proc/sys/kernel/random/boot_id"] = "second boot"
    second = this_host.__wrapped__()
    assert first != second and first.rpartition("/")[0] == second.rpartition("/")[0]

    monkeypatch.setattr(Path, "readlink", lambda path: Path("pid:[4026532000]"))  # in a container
    assert this_host.__wrapped__().count("/") == 1
