"""Whether a process lives, and one that must not live longer than who started it."""

import ctypes
import signal
import sys

import psutil

_PR_SET_PDEATHSIG = 1
# looked up here, because the dynamic loader must not be used between fork and exec of a process with threads
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent (the thread that started it) dies; elsewhere nothing.

    Otherwise a killed flow or `dvc repro` leaves what it started running, and its late output overwrites the next
    run's. A shell between the two would live on as the parent, so dvc.yaml starts each stage with `exec`. The signal is
    SIGKILL because a stage inside a long C call would not answer another in time. Fit for `preexec_fn`.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def is_alive(pid: int, created: float | None = None) -> bool:
    """Whether a process lives, and is the one that was made at `created` (seconds since 1970) if that is given.

    One that was killed but not yet collected by its parent does not.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and (created is None or process.create_time() == created)
    except psutil.NoSuchProcess:
        return False
