"""What retrainings came to, one JSON object a line, the oldest first."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from flows.paths import Paths

log = logging.getLogger(__name__)
Outcome = Literal["promoted", "kept", "unchanged", "failed"]
"""kept: there was a candidate, and the champion stays; unchanged: nothing new to learn from."""


@dataclass
class Entry:
    """One retraining. Times are ISO 8601 in UTC; seconds: {task: wall clock}; losses: nats per token on test rows."""

    started: str
    finished: str = ""
    outcome: Outcome = "failed"
    reason: str = ""
    version: str | None = None
    champion: str | None = None
    """Who held the stage before."""
    start: str | None = None
    """The version whose adapter was trained on; None: a new one."""
    files: int = 0
    fresh: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    """New files so unlike what the champion knows, or so small, that they were trained on but judged nothing."""
    set_aside: list[str] = field(default_factory=list)
    """Files that this retraining put aside."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """What lies in `retrain.incoming` and was not taken, and why."""
    seconds: dict[str, float] = field(default_factory=dict)
    drift: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    promotion: dict[str, Any] | None = None
    page: str | None = None
    """The candidate's own page, beside the history."""


def entries(paths: Paths) -> list[Entry]:
    """All that is on record; a line that a crash cut short is warned of and passed over.

    Fields that another release has written and this one does not know are left out.
    """
    if not paths.retraining_history.exists():
        return []
    found, known = [], {field.name for field in fields(Entry)}
    for number, line in enumerate(paths.retraining_history.read_text().splitlines(), start=1):
        try:
            value = json.loads(line)
            found.append(Entry(**{key: value[key] for key in value.keys() & known}))
        except (AttributeError, TypeError, ValueError):
            log.warning("%s:%d: half a line, of a crash; passed over", paths.retraining_history.name, number)
    return found


def append(paths: Paths, entry: Entry) -> None:
    """Add one, on disk before this returns."""
    paths.retraining.mkdir(parents=True, exist_ok=True)
    with paths.retraining_history.open("a+b") as file:
        if file.tell() and not _ends_whole(file):
            file.write(b"\n")  # or the cut line and this one would be one
        file.write((json.dumps(asdict(entry)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_whole(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
