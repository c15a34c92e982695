"""Process lifetimes: whether a process lives, and processes that end with their parent.

A process number is valid on one host (or container) only, so a note on a shared disk names the host too.
"""

import ctypes
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1
_NO_CONTAINER = "pid:[4026531836]"
"""Target of the link /proc/self/ns/pid outside of containers. Linux fixes the number (PROC_PID_INIT_INO)."""
# loaded here, because the dynamic loader must not run between fork and exec in a process with threads
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent (the thread that started it) ends; no effect on other systems.

    Without this, a killed flow or `dvc repro` leaves stages running, whose late output overwrites the next run's. A
    shell in between would survive as the parent, so dvc.yaml starts stages with `exec`. The signal is SIGKILL, because
    a stage in a long C call would not handle another one in time. Suitable for `preexec_fn`.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def watch_parent(seconds: float = 1.0) -> None:
    """Kill this process when its parent dies: by `die_with_parent`, or by a thread where there is no `prctl`.

    Args:
        seconds: How often the thread looks who the parent is.
    """
    if _PRCTL is not None:
        die_with_parent()
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def start_time(process: psutil.Process) -> float:
    """Return the time at which a process started: seconds since the boot on Linux, elsewhere since 1970.

    Linux counts from the boot. psutil adds the time of the boot, which moves whenever the system's clock is set.
    """
    if sys.platform != "linux":
        return process.create_time()
    boot = psutil.boot_time()  # before create_time(): earlier releases of psutil add the last result of boot_time()
    return round(process.create_time() - boot, 2)  # in Linux's ticks of 0.01 seconds


def is_alive(pid: int, started: float | None = None) -> bool:
    """Return True if a process lives and, if `started` is given, has this `start_time`.

    A zombie, killed but not yet collected by its parent, counts as dead.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and (started is None or start_time(process) == started)
    except psutil.NoSuchProcess:
        return False


@cache
def this_host() -> str:
    """Return the host's name and digests that make process numbers unique: `name/machine/boot`.

    In a container, and where Linux gives the machine no id, it is `name/digest`, of boot and container together.
    """
    name = socket.gethostname()
    boot, machine = Path("/proc/sys/kernel/random/boot_id"), Path("/etc/machine-id")
    if not boot.exists():
        return f"{name}/{_digest(name)}"
    booted, container = boot.read_text(encoding="utf-8").strip(), str(Path("/proc/self/ns/pid").readlink())
    identity = machine.read_text(encoding="utf-8").strip() if machine.exists() and container == _NO_CONTAINER else ""
    if not identity:
        return f"{name}/{_digest(name, booted, container)}"
    return f"{name}/{_digest(name, identity)}/{_digest(name, booted)}"


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def is_noted_alive(note: Mapping[str, Any]) -> bool | None:
    """Return True if a noted process lives; None if it is on another host, where that cannot be checked.

    A process of an earlier boot of this machine has ended.

    note: `pid`, and optionally `start_time`, from the function of this name, and `host`, from `this_host`.
    """
    host, here = str(note.get("host", this_host())), this_host()
    if host != here:
        is_of_this_machine = here.count("/") == 2 and host.rpartition("/")[0] == here.rpartition("/")[0]
        return False if is_of_this_machine else None
    return is_alive(int(note["pid"]), note.get("start_time"))
