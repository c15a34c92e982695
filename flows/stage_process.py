"""One stage as a subprocess: streamed, stopped after a time, and never left behind by a parent that was killed."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from flows import logs
from flows.errors import StageError
from flows.processes import die_with_parent, is_alive
from flows.progress import RUN
from flows.project import DVC, stage_environment

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
    Raises StageError if it fails or takes longer.
    """
    forget_dead_locks(root)
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


def forget_dead_locks(root: Path) -> None:
    """Drop DVC's note of files in use if none of the processes in it lives any more.

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
