"""The outbox: events that are stored until each of their receivers has accepted them.

The outbox is an SQLite file. Each change is on the disk before the call returns, so a killed process loses nothing.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.errors import RepositoryError
from flows.runtime.git import Git
from flows.webhooks.events import Event, TagProof

LOCATION = "PEFTCORE_OUTBOX"
"""Environment variable with another path of the outbox, for clones that do not last, as those of CI jobs."""
LONGEST_DELAY = 3600.0
"""Seconds between two attempts at most."""
FIRST_DELAY = 10.0
"""Seconds after the first failed attempt; each further failure doubles them."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    place INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, type TEXT NOT NULL, body TEXT NOT NULL, proof TEXT
);
CREATE TABLE IF NOT EXISTS deliveries (
    event TEXT NOT NULL, url TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0,
    failing_since REAL, error TEXT, delivered REAL, PRIMARY KEY (event, url)
);
"""


@dataclass(frozen=True)
class Delivery:
    """An event that one receiver has to get. Times: seconds since 1970.

    Attributes:
        event: id of the event.
        type: type of the event.
        url: the receiver.
        body: JSON to send.
        attempts: failed attempts so far (count).
        due: time of the next attempt.
        failing_since: time of the first failed attempt; None if there was none.
        error: reason of the last failure.
    """

    event: str
    type: str
    url: str
    body: str
    attempts: int
    due: float
    failing_since: float | None
    error: str | None


def outbox_path(root: Path) -> Path:
    """Return the outbox of the project at `root`, shared by all working trees of the repository."""
    if location := os.environ.get(LOCATION):
        return Path(location)
    git = Git(root)
    # projects of one repository may have different secrets for one receiver
    return git.common_folder() / "peftcore" / git.prefix / "webhooks.sqlite"


class Outbox:
    """The events of one outbox.

    Every method raises RepositoryError if the file cannot be read or written.

    Args:
        path: the SQLite file, which is created when it is needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock(self) -> Path:
        """Lock that is shared by processes between the announcement of an event and its tag."""
        return self.path.with_suffix(".lock")

    def check(self) -> None:
        """Create the outbox if it does not exist, and its folder."""
        with self._open():
            pass

    def add(self, event: Event, urls: Sequence[str], proof: TagProof | None = None) -> None:
        """Store an event. An event with a proof is sent once `confirm` is called.

        An event that is stored already does not change, except for one that waits for its proof.

        Args:
            event: the event.
            urls: its receivers.
            proof: the tag that will prove that the event has happened.
        """
        with self._open() as database:
            database.execute(
                "INSERT INTO events (id, type, body, proof) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE "
                "SET body = excluded.body, proof = excluded.proof WHERE events.proof IS NOT NULL",
                (event.id, event.type, event.body(), None if proof is None else json.dumps(asdict(proof))),
            )
            database.executemany(
                "INSERT OR IGNORE INTO deliveries (event, url) VALUES (?, ?)", [(event.id, url) for url in urls]
            )

    def confirm(self, event: str) -> None:
        """Release a stored event for sending."""
        with self._open() as database:
            database.execute("UPDATE events SET proof = NULL WHERE id = ?", (event,))

    def discard(self, event: str) -> bool:
        """Remove an event, so that it is not sent any more. Returns False if there is no such event."""
        with self._open() as database:
            database.execute("DELETE FROM deliveries WHERE event = ?", (event,))
            return database.execute("DELETE FROM events WHERE id = ?", (event,)).rowcount > 0

    def unproven(self) -> dict[str, TagProof]:
        """Return {id: proof} of the events that wait for their proof."""
        with self._open() as database:
            rows = database.execute("SELECT id, proof FROM events WHERE proof IS NOT NULL ORDER BY place").fetchall()
        return {event: TagProof(**json.loads(proof)) for event, proof in rows}

    def waiting(self) -> list[Delivery]:
        """Return the deliveries that no receiver has accepted yet: those with fewer failures first, then older ones."""
        with self._open() as database:
            rows = database.execute(
                "SELECT event, type, url, body, attempts, due, failing_since, error FROM deliveries "
                "JOIN events ON events.id = event WHERE delivered IS NULL AND proof IS NULL ORDER BY attempts, place"
            ).fetchall()
        return [Delivery(*row) for row in rows]

    def note_delivered(self, delivery: Delivery, now: float) -> None:
        """Record that the receiver has accepted the event."""
        self._update(delivery, delivered=now, error=None)

    def note_failed(self, delivery: Delivery, reason: str, now: float) -> float:
        """Record a failed attempt; returns the time of the next one."""
        due = now + min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(delivery.attempts, 30))
        since = now if delivery.failing_since is None else delivery.failing_since
        self._update(delivery, attempts=delivery.attempts + 1, due=due, failing_since=since, error=reason)
        return due

    def _update(self, delivery: Delivery, **values: Any) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._open() as database:
            database.execute(
                f"UPDATE deliveries SET {columns} WHERE event = ? AND url = ?",
                (*values.values(), delivery.event, delivery.url),
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Give a transaction: committed and on the disk at the end, undone after an exception."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=30)) as database:
                database.execute("PRAGMA synchronous = FULL")
                database.executescript(_SCHEMA)
                with database:
                    yield database
        except (sqlite3.Error, OSError) as error:
            raise RepositoryError(
                f"the outbox of webhooks {self.path} cannot be used ({error}); free some space, or make the file "
                f"writable, or give another one in {LOCATION}; then run this again"
            ) from error
