"""State of the running pipeline and outcome of the last run: two small files for `status` and `run --json`.

Both are written atomically. The first is deleted when the run ends; after a kill, its process number shows that the run
is over.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from flows.errors import GateError
from flows.paths import Paths
from flows.runtime.processes import is_noted_alive, start_time, this_host
from peftcore.files import write_atomically

INTERRUPTED = 130
FAILED = 1


@dataclass
class RunRecord:
    """A run in progress. started: ISO 8601, UTC; seconds: {task: wall-clock seconds}; promotion: JSON values."""

    paths: Paths
    started: str
    seconds: dict[str, float] = field(default_factory=dict)
    task: str | None = None
    promotion: dict[str, Any] | None = None
    page: str | None = None

    @contextmanager
    def at(self, task: str) -> Iterator[None]:
        """Record a task while the context is open, and its duration, also after an error."""
        self.task = task
        self._note()
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[task] = time.monotonic() - began

    def end(self, error: BaseException | None) -> None:
        """Write the outcome. error: the error that ended the run, if any."""
        promoted = self.promotion["outcome"] if self.promotion else "failed"
        outcome = {
            "outcome": promoted if error is None or isinstance(error, GateError) else _outcome(error),
            "status": _status(error),
            "started": self.started,
            "finished": _now(),
            "seconds": self.seconds,
            "failed_task": self.task if error is not None and not isinstance(error, GateError) else None,
            "error": None if error is None else str(error) or type(error).__name__,
            "version": self.promotion["version"] if self.promotion else None,
            "promotion": self.promotion,
            "page": self.page,
        }
        write_atomically(last_run_file(self.paths), json.dumps(outcome, indent=2) + "\n")
        running_file(self.paths).unlink(missing_ok=True)

    def _note(self) -> None:
        process = psutil.Process()
        note = {"pid": process.pid, "start_time": start_time(process), "host": this_host()}
        note |= {"started": self.started, "task": self.task}
        write_atomically(running_file(self.paths), json.dumps(note) + "\n")


@contextmanager
def recorded(paths: Paths) -> Iterator[RunRecord]:
    """Record one run, whatever its outcome."""
    record = RunRecord(paths, _now())
    try:
        yield record
    except BaseException as error:
        record.end(error)
        raise
    record.end(None)


def last_run(paths: Paths) -> dict[str, Any] | None:
    """Return the outcome of the last run that ended; None if there was none."""
    return _read(last_run_file(paths))


def running(paths: Paths) -> dict[str, Any] | None:
    """Return the note of the current run: pid, host, started, task, and `alive`; None if there is no run.

    alive: True if its process lives; None if it is on another host, where that cannot be checked.
    """
    note = _read(running_file(paths))
    if note is None:
        return None
    alive = is_noted_alive(note)
    note.pop("start_time", None)
    note.pop("created", None)  # the key of earlier releases, whose value moved with the system's clock
    return note | {"alive": alive}


def last_run_file(paths: Paths) -> Path:
    """Return the path of the file that holds the outcome of the last run."""
    return paths.review.with_name("last_run.json")


def running_file(paths: Paths) -> Path:
    """Return the path of the file that describes the current run."""
    return paths.review.with_name("running.json")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _status(error: BaseException | None) -> int:
    """Return the exit status of `peftcore run`."""
    if error is None:
        return 0
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "status", FAILED)


def _outcome(error: BaseException) -> str:
    return "failed" if isinstance(error, Exception) else "interrupted"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
