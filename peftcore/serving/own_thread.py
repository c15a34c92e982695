"""Run a function in a thread of its own, which ends with the function.

Each thread that computes with several cores keeps its own helper threads of OpenMP. If a process has more of them than
cores, OpenMP's barriers sleep instead of spin, and a decoding step on a CPU takes up to twice as long. So only the
engine's thread may keep such helpers, and whatever loads weights runs here.
"""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def in_own_thread(work: Callable[..., T], *args: Any) -> "Future[T]":
    """Call `work(*args)` in a new thread; the future has its result or its error.

    The thread does not keep the process alive.
    """
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work(*args)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    Thread(target=run, name=f"peftcore-{getattr(work, '__name__', 'work')}", daemon=True).start()
    return future
