"""One stage as a subprocess: streamed, stopped after a time, and never left behind by a parent that was killed."""

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from flows.errors import BusyError, StageError
from flows.runtime import logs
from flows.runtime.processes import die_with_parent, is_alive, this_host
from flows.runtime.progress import RUN
from flows.runtime.project import DVC, stage_environment

SECONDS_TO_STOP = 60.0
"""How long an interrupted stage may take to leave what it was writing whole."""

SECONDS_TO_WRITE = 0.5
"""After which DVC's note of files in use is no longer one that is being written."""


def run_stage(
    root: Path,
    stage: str,
    timeout: float,
    force: bool = False,
    place: str | None = None,
    options: Sequence[str] = (),
) -> None:
    """Bring one stage up to date by DVC, its output streamed to this terminal; the code that runs is that of `root`.

    timeout: seconds; force: run it even if nothing changed; place: in a run, as `progress.RUN` has it; options: further
    ones of `dvc repro`. What it prints goes to stderr.
    Raises StageError if it fails or takes longer, BusyError if another host is at work in this folder.
    """
    with _at_work(root):
        _run_stage(root, stage, timeout, force, place, options)


def _run_stage(root: Path, stage: str, timeout: float, force: bool, place: str | None, options: Sequence[str]) -> None:
    command = [*DVC, "repro", "--single-item", *(["--force"] if force else []), *options, stage]
    environment = stage_environment() | ({RUN: place} if place else {})
    # before another copy of the code that is installed, or named in PYTHONPATH
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [environment.get("PYTHONPATH")])])
    streams = contextlib.ExitStack()
    out, err = streams.enter_context(logs.streams(stage))
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=err, preexec_fn=die_with_parent)
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise StageError(
            f"stage {stage} took longer than {timeout:g} seconds and was stopped; what it saved is kept. "
            "Allow more with `peftcore run --stage-timeout SECONDS`"
        ) from None
    except KeyboardInterrupt:
        # the terminal has interrupted the stage as well; give it time to end by itself
        _wait(process, SECONDS_TO_STOP)
        raise
    except BaseException:
        # SIGTERM, which the stage below has not got: training saves its step first
        _terminate_stage(process)
        _wait(process, SECONDS_TO_STOP)
        raise
    finally:
        if process.poll() is None:
            process.kill()  # the stage below it dies with it
            process.wait()
        streams.close()
    if status:
        raise StageError(f"stage {stage} failed; its own message is above")


@contextmanager
def _at_work(root: Path) -> Iterator[None]:
    """Hold a lock of the folder, which processes of one host share, and which the system frees with each of them.

    DVC's own note of files in use holds process numbers alone. On a disk that several hosts share, those of another
    host would be taken for dead, or for a process here. Raises BusyError if another host has the lock.
    """
    path = root / ".dvc" / "tmp" / "peftcore.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # somebody is at work here; who, the file says
        else:
            file.truncate(0)
            file.write(f"{this_host()}\n")
            file.flush()
            forget_dead_locks(root)
        # This waits while another process looks at DVC's note. A lock becomes a shared one in two steps: another host
        # may take it in between, and the file then has that host's name.
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        host = file.read().strip()
        if host != this_host():
            raise BusyError(
                f"{host or 'another host'} is at work in {root}; wait for it, or work in a clone of your own"
            )
        yield


def forget_dead_locks(root: Path) -> None:
    """Drop DVC's note of files in use if none of the processes in it, which are of this host, lives any more.

    DVC does so by itself, but takes a killed process for alive until its parent has collected it, which in a container
    may be never.
    """
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        text = path.read_text()
    except OSError:
        return
    try:
        locks = json.loads(text)
    except json.JSONDecodeError:
        # DVC, which writes it in place, was killed while it did, and would refuse it for ever; or is writing it now
        time.sleep(SECONDS_TO_WRITE)
        if path.exists() and path.read_text() == text:
            path.unlink(missing_ok=True)
        return
    writers = locks.get("write", {}).values()
    holders = [*writers, *(reader for readers in locks.get("read", {}).values() for reader in readers)]
    if holders and not any(is_alive(int(holder["pid"])) for holder in holders):
        path.unlink(missing_ok=True)


def _terminate_stage(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to what DVC runs; DVC itself would leave it behind."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for stage in psutil.Process(process.pid).children():
            stage.terminate()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
