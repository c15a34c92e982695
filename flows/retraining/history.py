"""The history of retrainings: a file with one JSON object per line, oldest first."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from flows.paths import Paths

log = logging.getLogger(__name__)
RetrainingOutcome = Literal["promoted", "kept", "unchanged", "failed"]
"""kept: there was a candidate, and the champion stays; unchanged: there were no new files."""
RENAMED = {"fresh": "new_files", "unproven": "quarantined", "set_aside": "excluded", "passed_over": "skipped"}
"""{field in histories of releases before 0.2: its present name}"""


@dataclass
class Entry:
    """One retraining. Times are ISO 8601 in UTC; seconds: {task: wall clock}; losses: nats per token on test rows."""

    started: str
    finished: str = ""
    outcome: RetrainingOutcome = "failed"
    reason: str = ""
    version: str | None = None
    champion: str | None = None
    """The holder of the stage before."""
    start: str | None = None
    """The version whose adapter was trained further; None for a new adapter."""
    files: int = 0
    new_files: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    """Files that drifted too far, are too small or have untrusted names: trained on, but kept out of evaluation."""
    excluded: list[str] = field(default_factory=list)
    """Files that this retraining excluded from later ones."""
    skipped: dict[str, str] = field(default_factory=dict)
    """{entry of `retrain.incoming` that is not a file of rows: reason}"""
    seconds: dict[str, float] = field(default_factory=dict)
    drift: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    promotion: dict[str, Any] | None = None
    page: str | None = None
    """The candidate's own page, beside the history."""


def entries(paths: Paths) -> list[Entry]:
    """Return all entries. An incomplete line, left by a crash, is skipped with a warning.

    Fields of other releases that this release does not know are ignored.
    """
    if not paths.retraining_history.exists():
        return []
    history, known = [], {field.name for field in fields(Entry)}
    for number, line in enumerate(paths.retraining_history.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            value = {str(RENAMED.get(key, key)): one for key, one in json.loads(line).items()}
            history.append(Entry(**{key: value[key] for key in value.keys() & known}))
        except (AttributeError, TypeError, ValueError):
            log.warning("%s:%d: incomplete line of a crash, skipped", paths.retraining_history.name, number)
    return history


def append(paths: Paths, entry: Entry) -> None:
    """Append an entry, which is on disk when this returns."""
    paths.retraining.mkdir(parents=True, exist_ok=True)
    with paths.retraining_history.open("a+b") as file:
        if file.tell() and not _ends_whole(file):
            file.write(b"\n")  # ends an incomplete line
        file.write((json.dumps(asdict(entry)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_whole(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
