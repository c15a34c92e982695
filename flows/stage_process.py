"""One stage as a subprocess: streamed, stopped after a time, and never left behind by a parent that was killed."""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

from flows.errors import StageError
from flows.project import DVC, stage_environment

SECONDS_TO_STOP = 60.0
"""How long an interrupted stage may take to leave what it was writing whole."""

_PR_SET_PDEATHSIG = 1
# looked up here, because the dynamic loader must not be used between fork and exec of a process with threads
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def run_stage(root: Path, stage: str, timeout: float, force: bool = False) -> None:
    """Bring one stage up to date by DVC, its output streamed to this terminal.

    timeout: seconds; force: run it even if nothing changed. Raises StageError if it fails or takes longer.
    """
    command = [*DVC, "repro", "--single-item", *(["--force"] if force else []), stage]
    process = subprocess.Popen(command, cwd=root, env=stage_environment(), preexec_fn=_die_with_parent)
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
    finally:
        if process.poll() is None:
            process.kill()  # the stage below it dies with it
            process.wait()
    if status:
        raise StageError(f"stage {stage} failed; its own message is above")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _die_with_parent() -> None:
    """A killed flow leaves no DVC behind that goes on writing."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
