"""Commands in a group of their own, as a terminal gives them, and what is left of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[3]
PEFTCORE = (sys.executable, "-m", "flows.cli")
DVC = (sys.executable, "-m", "dvc")


def _heed_interrupts() -> None:
    # a test run that a shell put into the background ignores them, and its children would too
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment(**more: str) -> dict[str, str]:
    """This process's, with this repository's code and this Python first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}


@contextmanager
def started(root: Path, *command: str, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """A command in its own group; whatever happens, nothing of it is left afterwards."""
    log = root.with_name(f"{root.name}.started").open("w")
    with (
        log,
        subprocess.Popen(
            command,
            cwd=root,
            env=environment(**variables),
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()
            for one in left_in(root):
                one.kill()


def told(root: Path) -> str:
    """What the last command that was started in a repository wrote."""
    return root.with_name(f"{root.name}.started").read_text()


def done(root: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A command that is waited for."""
    env = environment(**variables)
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=300)


def left_in(root: Path) -> list[psutil.Process]:
    """Processes that work in a repository, or keep Prefect's state in it; zombies are none."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            home = process.environ().get("PREFECT_HOME", "")
            if Path(process.cwd()).is_relative_to(root) or Path(home).is_relative_to(root):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def eventually(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What a condition comes to, asked again until it holds."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
