"""Logs: one set-up for the commands and the stages, on stderr; stdout is for results.

What is chosen travels in the environment, so that a stage logs as the command above it does: text for people, or one
JSON object a line (time, level, logger, stage, message, and exception where there is one).
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
"""The environment variable by which DVC tells a stage its name."""
OURS = ("flows", "peftcore")
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""Keeps other libraries from drawing bars."""

SECONDS_TO_END = 5.0
"""How long a relayed process's last lines are waited for; one that it has left behind may hold them open."""

logger = logging.getLogger(__name__)

_STDERR = 2


class LogFormat(StrEnum):
    """How a line of the log is written."""

    TEXT = "text"
    JSON = "json"


def choose(form: LogFormat | None = None, quiet: bool = False, verbose: bool = False) -> None:
    """Set the environment of this process and those below it; what is not chosen stays as it is."""
    if form is not None:
        os.environ[FORMAT] = form.value
    if quiet or verbose:
        os.environ[LEVEL] = "warning" if quiet else "debug"


def is_json() -> bool:
    """Whether lines of the log are JSON."""
    return os.environ.get(FORMAT, "").lower() == LogFormat.JSON


def is_quiet() -> bool:
    """Whether only warnings and errors are told, beside results."""
    return level() > logging.INFO


def level() -> int:
    """The least level of our own messages; INFO where the environment names none that there is."""
    return logging.getLevelNamesMapping().get(os.environ.get(LEVEL, "").upper(), logging.INFO)


def set_up() -> None:
    """Log as the environment says. Other libraries' messages are told from WARNING on.

    Does nothing to handlers that the root logger has already, as in tests.
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
    """Writes to what `sys.stderr` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. time: UTC, ISO 8601, milliseconds; stage: None outside of one."""

    def format(self, record: logging.LogRecord) -> str:
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
    """File descriptors for the stdout and stderr of a process that runs a stage: both lead to our stderr.

    What it prints is dropped where only warnings and errors are wanted. A pipe, which hides the terminal from DVC's
    bars too, is relayed until all who write to it are gone.
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
    """Pass on what a process printed: where the log is JSON, its JSON lines as they are and any other as a record.

    DVC itself, and a stage that is a program of somebody else, know nothing of our format.
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
