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


def is_alive(pid: int, created: float | None = None) -> bool:
    """Return True if a process lives and, if `created` (seconds since 1970) is given, started at that time.

    A zombie, killed but not yet collected by its parent, counts as dead.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and (created is None or process.create_time() == created)
    except psutil.NoSuchProcess:
        return False


@cache
def this_host() -> str:
    """Return the host's name and a digest of its boot and container, which make process numbers unique."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        parts += [boot.read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return f"{parts[0]}/{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def is_noted_alive(note: Mapping[str, Any]) -> bool | None:
    """Return True if a noted process lives; None if it is on another host.

    note: `pid`, and optionally `created` (seconds since 1970) and `host`, from `this_host`.
    """
    if note.get("host", this_host()) != this_host():
        return None
    return is_alive(int(note["pid"]), note.get("created"))
