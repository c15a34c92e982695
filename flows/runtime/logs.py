"""Logging of commands and stages to stderr; stdout is for results.

The format and level travel in the environment, so that stages log like their command: text, or one JSON object per line
(time, level, logger, stage, message, and exception if there is one).
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from threading import Thread
from types import TracebackType

FORMAT = "PEFTCORE_LOG_FORMAT"
LEVEL = "PEFTCORE_LOG_LEVEL"
STAGE = "DVC_STAGE"
"""Environment variable with which DVC names the stage."""
OURS = ("flows", "peftcore")
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""Variables that switch off progress bars of libraries."""

SECONDS_TO_END = 5.0
"""Seconds to wait for the last lines of a relayed process; a process that it left behind may keep the pipe open."""

logger = logging.getLogger(__name__)

_STDERR = 2


class LogFormat(StrEnum):
    """Format of a log line."""

    TEXT = "text"
    JSON = "json"


def choose(form: LogFormat | None = None, quiet: bool = False, verbose: bool = False) -> None:
    """Set format and level in the environment of this process and its children; None changes nothing."""
    if form is not None:
        os.environ[FORMAT] = form.value
    if quiet or verbose:
        os.environ[LEVEL] = "warning" if quiet else "debug"


def is_json() -> bool:
    """Return True if log lines are JSON."""
    return os.environ.get(FORMAT, "").lower() == LogFormat.JSON


def is_quiet() -> bool:
    """Return True if only warnings, errors and results are printed."""
    return level() > logging.INFO


def level() -> int:
    """Return the minimum level of our own messages; INFO unless the environment names a valid level."""
    return logging.getLevelNamesMapping().get(os.environ.get(LEVEL, "").upper(), logging.INFO)


def set_up() -> None:
    """Configure logging from the environment. Messages of libraries appear from WARNING on.

    Handlers that the root logger has already, as in tests, do not change.
    """
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, StderrHandler)]
    handler = handlers[0] if handlers else StderrHandler()
    handler.setFormatter(JsonFormatter() if is_json() else logging.Formatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in OURS:
        logging.getLogger(package).setLevel(level())
    if is_json():
        logging.captureWarnings(True)
        sys.excepthook = _log_exception
    if is_json() or is_quiet():
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)


class StderrHandler(logging.Handler):
    """Handler that writes to the current `sys.stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object. time: UTC, ISO 8601, milliseconds; stage: None outside a stage."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "stage": getattr(record, "stage", None) or os.environ.get(STAGE),
            "message": record.getMessage(),
        }
        if (status := getattr(record, "status", None)) is not None:
            line["status"] = status
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


@contextmanager
def streams(stage: str) -> Iterator[tuple[int, int]]:
    """Yield file descriptors for stdout and stderr of a stage's process; both lead to our stderr.

    In quiet mode stdout is dropped. A pipe, which also hides the terminal from DVC's bars, is relayed until all writers
    have closed it.
    """
    if not (is_json() or is_quiet()):
        yield _STDERR, _STDERR
        return
    reading, writing = os.pipe()
    lines = os.fdopen(reading, encoding="utf-8", errors="replace")
    thread = Thread(target=relay, args=(lines, stage), daemon=True)
    thread.start()
    try:
        yield subprocess.DEVNULL if is_quiet() else writing, writing
    finally:
        os.close(writing)
        thread.join(SECONDS_TO_END)


def relay(lines: Iterable[str], stage: str) -> None:
    """Pass on a process's output; with a JSON log, lines that are no records become records.

    DVC, and stages that are other programs, do not use our format.
    """
    for line in lines:
        text = line.strip()
        if not is_json() or _is_record(text):
            sys.stderr.write(line)
            sys.stderr.flush()
        elif text:
            severity = next((one for sign, one in _SEVERITIES if text.lower().startswith(sign)), logging.INFO)
            logger.log(severity, "%s", text, extra={"stage": stage})


_SEVERITIES = (("error:", logging.ERROR), ("warning:", logging.WARNING))


def _is_record(text: str) -> bool:
    if not text.startswith("{"):
        return False
    try:
        return {"time", "level", "message"} <= json.loads(text).keys()
    except json.JSONDecodeError:
        return False


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
