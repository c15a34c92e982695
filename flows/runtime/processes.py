"""Whether a process lives, and one that must not live longer than who started it.

A process's number means something on one host alone (in one container), so a note of it on a disk that several share
names the host as well.
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
# looked up here, because the dynamic loader must not be used between fork and exec of a process with threads
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent (the thread that started it) dies; elsewhere do nothing.

    Otherwise a killed flow or `dvc repro` leaves what it started running, and its late output overwrites the next
    run's. A shell between the two would live on as the parent, so dvc.yaml starts each stage with `exec`. The signal is
    SIGKILL because a stage inside a long C call would not answer another in time. Fit for `preexec_fn`.
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
    """Whether a process lives, and is the one that was made at `created` (seconds since 1970) if that is given.

    One that was killed but not yet collected by its parent does not.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and (created is None or process.create_time() == created)
    except psutil.NoSuchProcess:
        return False


@cache
def this_host() -> str:
    """The host's name and a digest of what makes process numbers unique there: its boot, and the container on it."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        parts += [boot.read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return f"{parts[0]}/{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def is_noted_alive(note: Mapping[str, Any]) -> bool | None:
    """Whether a noted process lives; None if it is one of another host, where nobody here can look.

    note: `pid`, and where they are known `created` (seconds since 1970) and `host`, as `this_host` has it.
    """
    if note.get("host", this_host()) != this_host():
        return None
    return is_alive(int(note["pid"]), note.get("created"))
