"""Rows of JSONL, CSV and Parquet files, each with its place, so that errors can name it."""

import csv
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
from pyarrow import parquet

from flows.errors import DataError
from flows.runtime.stage import is_disk_full

logger = logging.getLogger("flows.data")
LONGEST_ROW = 16 << 20
"""Bytes of a row, or characters of a field of CSV; about four million tokens."""
LEAST_UNPACKED, MOST_EXPANSION = 1 << 30, 1000
"""Bytes that a Parquet file may always unpack to, and for each of its own if that is more; honest text takes ten."""
SHOWN = 5
"""Files that are not read which an error names."""
_UNPACK, _CONVERT = "unpack it", "write it as .csv, .jsonl or .parquet"
_OFTEN_ROWS = {
    ".json": "write one row a line as .jsonl (`jq -c '.[]' FILE.json > FILE.jsonl`)",
    ".ndjson": "name it .jsonl",
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z"), _UNPACK),
    **dict.fromkeys((".tsv", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro", ".pkl"), _CONVERT),
}
"""{suffix of files that often hold rows: what makes them readable}"""
_BATCH = 256
"""Rows of Parquet that are read at a time."""

Row = tuple[str, dict[str, Any]]
"""A row's place, such as `chats.jsonl:12`, and its columns."""


def read_rows(place: Path, source: str) -> Iterator[Row]:
    """The rows of a file, or of all files below a folder, in the order of their names.

    source: what the place was called by. Raises DataError if it is absent, holds no such file or cannot be parsed.
    """
    if not place.exists():
        raise DataError(f"data.source {source}: there is no {place}; give stdlib:docstrings, hub:NAME or a path")
    found = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    paths = [path for path in found if is_of_rows(path) and path.is_file()]
    passed_over = [f"{path.name}: {hint}" for path in found if (hint := why_unread(path)) is not None]
    if not paths:
        raise DataError(
            f"data.source {source}: {place} is or holds no {', '.join(_READERS)}; "
            + ("; ".join(passed_over[:SHOWN]) or "convert it to one")
        )
    for told in passed_over:
        logger.warning("data.source %s: not read: %s", source, told)
    for path in paths:
        name = path.relative_to(place).as_posix() if place.is_dir() else path.name
        if path.stat().st_size:
            yield from _READERS[path.suffix.lower()](path, name)


def is_of_rows(path: Path) -> bool:
    """Whether a file's name says that it holds rows which are read."""
    return path.suffix.lower() in _READERS


def why_unread(path: Path) -> str | None:
    """Return what to do with a file that is likely to hold rows but is not read; None for any other file."""
    return None if is_of_rows(path) else _OFTEN_ROWS.get(path.suffix.lower())


def _lines(file: IO[Any], name: str) -> Iterator[Any]:
    """The lines of a file, of which none is read further than a row may be long."""
    for number in itertools.count(1):
        line = file.readline(LONGEST_ROW + 1)
        if not line:
            return
        if len(line) > LONGEST_ROW:
            raise DataError(f"{name}:{number}: the line is longer than {LONGEST_ROW:,} bytes; split the row")
        yield line


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    """Parsed line by line rather than by `datasets`, whose errors name no line."""
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, name), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or endless nesting
                raise DataError(f"{name}:{number}: not JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise DataError(f"{name}:{number}: a row is a JSON object, and this is {type(row).__name__}")
            if b"\\u" in line and not _is_text(row):
                raise DataError(
                    f"{name}:{number}: it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; "
                    "mend or remove the row"
                )
            yield f"{name}:{number}", row


def _is_text(row: dict[str, Any]) -> bool:
    """Return whether every string of a row can be written as UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv(path: Path, name: str) -> Iterator[Row]:
    """Every value as text; `datasets` would make numbers of "1" and nothing of "NA"."""
    csv.field_size_limit(LONGEST_ROW)
    line = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(_lines(file, name), "")
            file.seek(0)
            rows = csv.DictReader(_lines(file, name), strict=True, delimiter=_delimiter(header))
            for row in rows:
                line = rows.line_num
                if None in row or None in row.values():
                    raise DataError(f"{name}:{line}: it has other columns than the header; mend the line")
                yield f"{name}:{line}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}:{line + 1}: not CSV in UTF-8 ({error}); mend the line") from error


def _delimiter(header: str) -> str:
    """Return what the columns are divided by: a comma, or where there is none a semicolon or tab, as Excel writes."""
    return next((mark for mark in ",;\t" if mark in header), ",")


def _parquet(path: Path, name: str) -> Iterator[Row]:
    """By pyarrow rather than `datasets`, which obeys what a file says of its columns: to open a path, or an address."""
    most, number, held = max(LEAST_UNPACKED, MOST_EXPANSION * path.stat().st_size), 0, 0
    try:
        with parquet.ParquetFile(path, memory_map=False) as file:
            for batch in file.iter_batches(_BATCH):
                held += batch.nbytes
                if held > most:
                    raise DataError(f"{name}: its {path.stat().st_size:,} bytes unpack to more than {most:,}; split it")
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", row
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if is_disk_full(error):
            raise
        raise DataError(f"{name}: not Parquet ({error}); write it anew") from error


_READERS = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
