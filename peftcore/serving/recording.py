"""Recorder of requests, answers and ratings: append-only files of JSON lines.

    FOLDER/000001.jsonl         a closed segment
    FOLDER/000002.jsonl.part    the segment that is written now, or that a killed server left
    FOLDER/salt                 secret of the pseudonyms of users

A thread of its own redacts and writes, so requests never wait for the disk. Records that arrive together are written
together and flushed to disk once. A server never appends to a segment of an earlier process, so kill -9 can damage only
the last line of a segment, and `read_records` counts such a line.

If the size limit is reached or the disk is full, recording stops and serving goes on: no record is deleted to make
room, because nobody may have turned it into rows yet. Recording resumes once closed segments are moved away.
"""

import contextlib
import hashlib
import hmac
import json
import logging
import os
import queue
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from peftcore.errors import ConfigError
from peftcore.files import flush_to_disk, write_atomically
from peftcore.serving.errors import BadRequestError, RecordingStoppedError, UnknownResponseError
from peftcore.serving.redaction import SECONDS, Redaction

logger = logging.getLogger(__name__)
Record = dict[str, Any]
"""{"kind": "answer" | "rating", "id", "time", ...}; docs/how-to/feedback.md lists the fields."""
SUFFIX, OPEN_SUFFIX = ".jsonl", ".jsonl.part"
WAITING = 10_000
"""Most records that wait for the writer (count)."""
RATEABLE = 200_000
"""Most answers that can be rated, the newest (count); 1,000 of them take about 0.2 MB of memory."""
TOGETHER = 256
"""Most records that are written before a flush to disk (count)."""
WARNING = "recording"
"""Source of the warning in /ready that recording has stopped."""


@dataclass(frozen=True)
class _Waiting:
    record: Record
    written: "Future[None]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.written.set_running_or_notify_cancel()  # a client that leaves cannot cancel it


class Recorder:
    """Writer of one folder. Create it before the server starts, and `close` it after the last request.

    Only the newest RATEABLE answers can be rated: a rating of an older one raises UnknownResponseError.

    Args:
        folder: The folder of the records; it is created, for its owner alone.
        most: Largest size of all segments together (bytes).
        redaction: Applied to every text before it is written.
        warnings: {source: text} of the server; the recorder adds and removes its own warning.
        segment: Size from which a segment is closed (bytes).

    Raises:
        ConfigError: The folder cannot be written, or another server records there.
    """

    def __init__(
        self,
        folder: Path,
        most: int = 256 << 20,
        redaction: Redaction | None = None,
        warnings: MutableMapping[str, str] | None = None,
        segment: int = 16 << 20,
    ):
        self._folder, self._most, self._segment = folder, most, segment
        self._redaction, self._warnings = redaction or Redaction(), {} if warnings is None else warnings
        self.written: Counter[str] = Counter()
        """Records on disk by kind (count)."""
        self.dropped: Counter[str] = Counter()
        """Records that were not written, by reason: full, disk, redaction, queue, error (count)."""
        self._file: IO[bytes] | None = None
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(WAITING)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not any(folder.iterdir()):  # never in a folder with files of its own
                write_atomically(folder / ".gitignore", "*\n")  # `git add --all` must not commit texts of users
            self._lock = _locked(folder)
            self._salt = _salt(folder)
            for path in sorted(folder.glob(f"*{OPEN_SUFFIX}")):  # of a server that was killed
                path.rename(path.with_name(path.name.removesuffix(".part")))
            self._number = max((int(path.name.split(".")[0]) for path in segments(folder)), default=0)
            self.size = _size(folder)
        except OSError as error:
            raise ConfigError(f"cannot record in {folder}: {error}; give a folder that this user can write") from error
        records = Records(folder)
        self._choices: OrderedDict[str, int] = OrderedDict()
        """{id of a recorded response: number of its answers}, at most RATEABLE"""
        for record in records:
            if record["kind"] == "answer":
                self._add_rateable(record)
        if records.damaged:
            logger.warning("%s: %d damaged lines are left out: %s", folder, len(records.damaged), records.damaged[:5])
        self._thread = threading.Thread(target=self._run, name="peftcore-recorder", daemon=True)
        self._thread.start()

    def answer(self, record: Record) -> None:
        """Record a request with its answers; does not wait. `id` and `choices` are required fields."""
        self._add_rateable(record)
        try:
            self._queue.put_nowait(_Waiting(self._stamped("answer", record)))
        except queue.Full:
            self._drop(record, "queue")

    def rating(self, record: Record) -> "Future[None]":
        """Record a rating. The result is there once the rating is on disk.

        Raises:
            UnknownResponseError: None of the newest RATEABLE recorded responses has this id.
            BadRequestError: The response has no answer of this index.
            RecordingStoppedError: The rating cannot be recorded; also raised by the result.
        """
        identity, index = record["id"], record["index"]
        if identity not in self._choices:
            raise UnknownResponseError(
                f"no recorded response has the id {identity!r:.100}; send the `id` of one of the newest {RATEABLE:,} "
                "responses of this server. A request with the header x-no-record is not recorded",
                "id",
            )
        if index >= (count := self._choices[identity]):
            raise BadRequestError(f"index: the response has {count} answers, from index 0; got {index}", "index")
        waiting = _Waiting(self._stamped("rating", record))
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            self._drop(record, "queue")
            raise RecordingStoppedError("too many records wait for the disk; send the rating again later") from None
        return waiting.written

    def close(self) -> None:
        """Write what waits, and close the segment."""
        self._queue.put(None)
        self._thread.join()
        self._lock.close()

    def _add_rateable(self, record: Record) -> None:
        self._choices[record["id"]] = len(record["choices"])
        if len(self._choices) > RATEABLE:
            self._choices.popitem(last=False)

    def _stamped(self, kind: str, record: Record) -> Record:
        user = record.get("user")
        pseudonym = user and hmac.digest(self._salt, user.encode(errors="replace"), "sha256").hex()[:16]
        return {"kind": kind, "id": record["id"], "time": _now()} | record | {"user": pseudonym}

    def _drop(self, record: Record, reason: str) -> None:
        self.dropped[reason] += 1
        if "choices" in record:
            self._choices.pop(record["id"], None)

    # -- the recorder's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while batch[-1] is not None and len(batch) < TOGETHER:
                    batch.append(self._queue.get_nowait())
            waiting = [one for one in batch if one is not None]
            try:
                self._write(waiting)
            except Exception as error:  # a fault of this module: without this thread every rating would wait for ever
                logger.exception("records were not written")
                for one in waiting:
                    if not one.written.done():
                        self._refuse(one, "error", f"{type(error).__name__}: {error}")
            if batch[-1] is None:
                self._close_segment()
                return

    def _write(self, batch: list[_Waiting]) -> None:
        """Write records and flush them to disk. What cannot be written is counted, and the server goes on."""
        lines = [(one, line) for one in batch if (line := self._line(one)) is not None]
        fitting: list[tuple[_Waiting, bytes]] = []
        room = self._room(sum(len(line) for _, line in lines))
        for one, line in lines:
            if len(line) > room:
                self._refuse(one, "full", f"the records in {self._folder} have reached {self._most:,} bytes")
                continue
            room -= len(line)
            fitting.append((one, line))
        if not fitting:
            return
        content = b"".join(line for _, line in fitting)
        try:
            self._append(content)
        except OSError as error:
            for one, _ in fitting:
                self._refuse(one, "disk", f"records cannot be written to {self._folder}: {error}")
            return
        if len(fitting) == len(lines) and self._warnings.pop(WARNING, None) is not None:
            logger.warning("recording again in %s", self._folder)
        for one, _ in fitting:
            self.written[one.record["kind"]] += 1
            one.written.set_result(None)

    def _line(self, one: _Waiting) -> bytes | None:
        try:
            return (json.dumps(_redacted(one.record, self._redaction), ensure_ascii=True) + "\n").encode()
        except TimeoutError:
            self._refuse(one, "redaction", f"a redaction rule took longer than {SECONDS:g} s on a text")
            return None

    def _refuse(self, one: _Waiting, reason: str, why: str) -> None:
        self._drop(one.record, reason)
        source, advice = WARNING, "requests are answered and not recorded. Move closed segments away, or free space"
        if reason == "redaction":
            source, advice = "redaction", "such records are left out. Correct the rule and start the server again"
        text = f"{why}; {advice}"
        if self._warnings.get(source) != text:
            logger.warning("%s", text)
        self._warnings[source] = text
        one.written.set_exception(RecordingStoppedError(f"the rating was not recorded: {why}"))

    def _room(self, needed: int) -> int:
        """Return the bytes that fit; counts the files again if they seem to be too large."""
        if self.size + needed > self._most:
            with contextlib.suppress(OSError):
                self.size = _size(self._folder)
        return self._most - self.size

    def _append(self, content: bytes) -> None:
        """Append lines to the open segment; after an error the segment ends with its last whole batch."""
        if self._file is None:
            self._number += 1
            path = self._folder / f"{self._number:06d}{OPEN_SUFFIX}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            self._file = os.fdopen(descriptor, "wb", buffering=0)
            flush_to_disk(self._folder)
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(content) != len(content):
                raise OSError("the disk took only a part of the records")
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            self._close_segment()
            raise
        self.size += len(content)
        if before + len(content) >= self._segment:
            self._close_segment()

    def _close_segment(self) -> None:
        if self._file is None:
            return
        path = Path(self._folder / f"{self._number:06d}{OPEN_SUFFIX}")
        is_empty = os.fstat(self._file.fileno()).st_size == 0
        self._file.close()
        self._file = None
        try:
            if is_empty:  # otherwise each record that finds the disk full would leave a file
                path.unlink()
                self._number -= 1
            else:
                path.rename(path.with_name(path.name.removesuffix(".part")))
            flush_to_disk(self._folder)
        except OSError as error:  # the next start closes it
            logger.warning("%s could not be closed: %s", path, error)


class Records:
    """Records of a folder in the order of their segments; also of one that a server writes at present.

    Raises:
        ConfigError: The folder does not exist or cannot be read.
    """

    def __init__(self, folder: Path):
        self.damaged: list[str] = []
        """Lines that could not be read, such as `000001.jsonl:17`; kill -9 can leave one at the end of a segment."""
        self._folder = folder

    def __iter__(self) -> Iterator[Record]:
        """Yield each whole record."""
        try:
            for path in segments(self._folder):
                with path.open("rb") as file:
                    for number, line in enumerate(file, start=1):
                        record = _parsed(line)
                        if record is None:
                            self.damaged.append(f"{path.name}:{number}")
                        else:
                            yield record
        except OSError as error:
            raise ConfigError(f"the records in {self._folder} cannot be read: {error}") from error


def segments(folder: Path) -> list[Path]:
    """Return the segments of a folder in order. Raises FileNotFoundError if there is no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    paths = [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{OPEN_SUFFIX}")]
    return sorted((path for path in paths if path.name.split(".")[0].isdigit()), key=lambda path: path.name)


def _parsed(line: bytes) -> Record | None:
    """Return the record of a line; None for a damaged line."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        return None
    if record.get("kind") == "answer":
        return record if isinstance(record.get("choices"), list) else None
    return record if record.get("kind") == "rating" else None


def _redacted(record: Record, redaction: Redaction) -> Record:
    """Return a record with each text of a user or a model redacted."""
    changes: Record = {
        key: redaction(record[key]) for key in ("prompt", "comment", "correction") if record.get(key) is not None
    }
    for key, text in (("messages", "content"), ("choices", "text")):
        if key in record:
            changes[key] = [_redacted_part(part, text, redaction) for part in record[key]]
    return record | changes


def _redacted_part(part: Record, text: str, redaction: Redaction) -> Record:
    """Return a message or a choice with its text and its tool calls redacted."""
    changes: Record = {text: redaction(part[text])}
    if part.get("tool_calls"):
        changes["tool_calls"] = [_redacted_call(call, redaction) for call in part["tool_calls"]]
    if part.get("tool_call_id") is not None:  # it stays equal to the id of the call
        changes["tool_call_id"] = redaction(part["tool_call_id"])
    return part | changes


def _redacted_call(call: Record, redaction: Redaction) -> Record:
    function = {key: _redacted_json(value, redaction) for key, value in call["function"].items()}
    return call | {"id": redaction(call["id"]), "function": function}


def _redacted_json(value: Any, redaction: Redaction) -> Any:
    """Return a JSON value with its texts and keys redacted. A number that a rule matches becomes a text."""
    if isinstance(value, str):
        return redaction(value)
    if isinstance(value, dict):
        return {redaction(key): _redacted_json(one, redaction) for key, one in value.items()}
    if isinstance(value, list):
        return [_redacted_json(one, redaction) for one in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value)
        redacted = redaction(text)
        return value if redacted == text else redacted
    return value


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in segments(folder))


def _salt(folder: Path) -> bytes:
    path = folder / "salt"
    if not path.exists():
        write_atomically(path, secrets.token_hex(32))
        path.chmod(0o600)
    return hashlib.sha256(path.read_bytes()).digest()


def _locked(folder: Path) -> IO[str]:
    """Return the open lock file of a folder. Raises ConfigError if another process has the lock."""
    file = (folder / "lock").open("a", encoding="utf-8")
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(f"another server records in {folder}; give each server a folder of its own") from error
    return file


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
