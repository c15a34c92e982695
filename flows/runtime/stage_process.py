"""A stage as a subprocess: streamed output, a time limit, and no process left behind by a killed parent."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from flows.errors import BusyError, RepositoryError, StageError, StageStopped
from flows.paths import stage_from_here
from flows.runtime import logs
from flows.runtime.fork_server import ADDRESS
from flows.runtime.processes import die_with_parent, is_alive, this_host
from flows.runtime.progress import RUN
from flows.runtime.project import DVC, missing_inputs, outputs_without_cache, stage_environment
from flows.runtime.stage_code import refresh
from flows.runtime.temporary import temporary_folder

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Variables of glibc's malloc with which a process keeps the memory that it frees, unless they are set already.

By default every forward pass gives its memory back to the system, and the next one waits for it to be cleared again:
6.4 in place of 5.5 s for a training step in float32 (SmolLM2-135M, 4 x 256 tokens), at the same peak.
"""

SECONDS_TO_STOP = 60.0
"""Seconds that an interrupted stage gets to finish writing."""

SECONDS_TO_NOTICE = 5.0
"""Seconds after which a stage that still runs is taken for one that the interrupt did not reach."""

SECONDS_BETWEEN_LOOKS = 1.0
"""Seconds between two calls of `should_stop`."""

SECONDS_TO_WRITE = 0.5
"""Seconds after which an invalid lock file of DVC is no longer being written."""


LONGEST_ADDRESS = 107
"""Bytes of the path of a socket, of which Linux allows 108 with the zero at the end."""


def run_stage(
    root: Path,
    stage: str,
    timeout: float,
    force: bool = False,
    place: str | None = None,
    options: Sequence[str] = (),
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Run one stage with `dvc repro --single-item`, which does nothing if the stage is up to date.

    The stage runs the code of `root`. Its output goes to this process's stderr.

    Args:
        root: The repository.
        stage: Name of the stage.
        timeout: Time limit (seconds).
        force: Run the stage even if nothing changed.
        place: Position of the stage in the run for the progress bar, such as "3/7"; see `progress.RUN`.
        options: Further options of `dvc repro`.
        should_stop: Called every second; True stops the stage.

    Raises:
        StageStopped: `should_stop` returned True.
        StageError: The stage failed or exceeded the time limit, or DVC did not store its outputs.
        BusyError: A process of another machine is running a stage in this folder.
    """
    refresh(root)
    with _at_work(root):
        _run_stage(root, stage, timeout, force, place, options, should_stop)


def _run_stage(
    root: Path,
    stage: str,
    timeout: float,
    force: bool,
    place: str | None,
    options: Sequence[str],
    should_stop: Callable[[], bool] | None,
) -> None:
    command = [*DVC, "repro", "--single-item", *(["--force"] if force else []), *options, stage]
    environment = environment_with_code(root) | ({RUN: place} if place else {})
    streams = contextlib.ExitStack()
    out, err = streams.enter_context(logs.streams(stage))
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=err, preexec_fn=die_with_parent)
    try:
        status = process.wait(timeout) if should_stop is None else _watched(process, stage, timeout, should_stop)
    except subprocess.TimeoutExpired:
        raise StageError(
            f"stage {stage} took longer than {timeout:g} seconds and was stopped; its saved state is kept. "
            "Allow more with `peftcore run --stage-timeout SECONDS`"
        ) from None
    except KeyboardInterrupt:
        # a terminal has interrupted the stage too, which then ends by itself; `kill -INT` reaches this process alone
        _wait(process, SECONDS_TO_NOTICE)
        if process.poll() is None:
            _terminate_stage(process)
        _wait(process, SECONDS_TO_STOP)
        raise
    except BaseException:
        # SIGTERM, which did not reach the stage: training saves its state first
        _terminate_stage(process)
        _wait(process, SECONDS_TO_STOP)
        raise
    finally:
        if process.poll() is None:
            process.kill()  # its stage ends with it
            process.wait()
        streams.close()
    if status < 0:
        raise StageError(f"stage {stage}: DVC was killed ({signal.strsignal(-status)}); run it again to continue")
    if status:
        missing = "".join(
            f"; {name} is missing, which stage {earlier} writes: run `peftcore stage {earlier}`, or `peftcore run`"
            for name, earlier in missing_inputs(root, stage).items()
        )
        raise StageError(f"stage {stage} failed; its own message is above{missing}")
    if "--no-commit" not in options and (lost := outputs_without_cache(root, stage)):
        raise StageError(
            f"stage {stage}: DVC did not store {', '.join(lost)} in its cache, for the reason above; on a full disk, "
            f"free some space, such as by `peftcore registry gc`. "
            f"`dvc commit --force {stage_from_here(root, stage)}` then stores what the stage made"
        )


def environment_with_code(root: Path) -> dict[str, str]:
    """Return the environment of DVC and its stages, in which Python finds the code of `root` before any other."""
    environment = KEEP_MEMORY | stage_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [environment.get("PYTHONPATH")])])
    return environment


@contextmanager
def forked_stages(root: Path) -> Iterator[None]:
    """Let the stages that `run_stage` starts meanwhile be forks of one process, which has imported their libraries.

    A stage that cannot be a fork imports for itself; `flows.runtime.fork_server` says which. The process ends with the
    context, and with the thread that opened it.

    Args:
        root: The repository.
    """
    has_stages = "-m flows.stages." in (root / "dvc.yaml").read_text(encoding="utf-8")
    if sys.platform != "linux" or not has_stages:
        yield
        return
    with temporary_folder("peftcore-forks-") as folder, logs.streams("imports") as (out, err):
        address = str(folder / "socket")
        if len(os.fsencode(address)) > LONGEST_ADDRESS:
            yield
            return
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()  # a stage that asks early waits until the imports are done
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.runtime.fork_server", str(listener.fileno())],
                cwd=root,
                env=environment_with_code(root),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=[listener.fileno()],
                preexec_fn=die_with_parent,
            )
        os.environ[ADDRESS] = address
        try:
            yield
        finally:
            os.environ.pop(ADDRESS, None)
            process.kill()
            process.wait()


def _watched(process: subprocess.Popen[bytes], stage: str, timeout: float, should_stop: Callable[[], bool]) -> int:
    """Wait for the process as `Popen.wait` does, and ask `should_stop` every second."""
    until = time.monotonic() + timeout
    while True:
        try:
            return process.wait(SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                raise
        if should_stop():
            raise StageStopped(f"stage {stage} was stopped before its end")


@contextmanager
def _at_work(root: Path) -> Iterator[None]:
    """Hold the folder's lock, which processes of one machine share; the system releases it when they end.

    DVC's own lock file has process numbers only. On a disk shared by several machines, DVC would mistake the process
    numbers of another machine for its own, or for those of dead processes.

    Raises:
        BusyError: A process of another machine has the lock.
        RepositoryError: The folder cannot be written.
    """
    path = root / ".dvc" / "tmp" / "peftcore.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RepositoryError(f"{path} cannot be written: {error.strerror}; make the folder writable") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another process has the lock; the file names its host
        else:
            file.truncate(0)
            file.write(f"{this_host()}\n")
            file.flush()
            forget_dead_locks(root)
        # this waits while another process checks DVC's lock file; the change to a shared lock takes two steps, and if
        # another host gets the lock in between, the file names that host
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        host = file.read().strip()
        if host != this_host():
            raise BusyError(
                f"{host or 'another host'} is working in {root}; wait for it, or work in a clone of your own"
            )
        yield


def forget_dead_locks(root: Path) -> None:
    """Delete DVC's lock file if none of its processes, which are of this host, lives any more.

    DVC does this itself, but takes a zombie for alive until its parent collects it, which may never happen in a
    container.
    """
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return
    try:
        locks = json.loads(text)
    except json.JSONDecodeError:
        # DVC was killed while writing the file in place, and would refuse it for ever; or DVC is writing it now
        time.sleep(SECONDS_TO_WRITE)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            path.unlink(missing_ok=True)
        return
    writers = locks.get("write", {}).values()
    holders = [*writers, *(reader for readers in locks.get("read", {}).values() for reader in readers)]
    if holders and not any(is_alive(int(holder["pid"])) for holder in holders):
        path.unlink(missing_ok=True)


def _terminate_stage(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the stage; DVC itself would leave it running."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for stage in psutil.Process(process.pid).children():
            stage.terminate()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
