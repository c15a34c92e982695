"""Rows of JSONL, CSV and Parquet files, each with its place, so that errors can name it."""

import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from flows.errors import DataError
from flows.stage import is_disk_full

Row = tuple[str, dict[str, Any]]
"""A row's place, such as `chats.jsonl:12`, and its columns."""


def read_rows(place: Path, source: str) -> Iterator[Row]:
    """The rows of a file, or of all files below a folder, in the order of their names.

    source: what the place was called by. Raises DataError if it is absent, holds no such file or cannot be parsed.
    """
    if not place.exists():
        raise DataError(f"data.source {source}: there is no {place}; give stdlib:docstrings, hub:NAME or a path")
    found = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    paths = [path for path in found if path.suffix in _READERS]
    if not paths:
        raise DataError(f"data.source {source}: {place} is or holds no {', '.join(_READERS)}; convert it to one")
    for path in paths:
        name = path.relative_to(place).as_posix() if place.is_dir() else path.name
        if path.stat().st_size:
            yield from _READERS[path.suffix](path, name)


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    """Parsed line by line rather than by `datasets`, whose errors name no line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                raise DataError(f"{name}:{number}: not JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise DataError(f"{name}:{number}: a row is a JSON object, and this is {type(row).__name__}")
            yield f"{name}:{number}", row


def _csv(path: Path, name: str) -> Iterator[Row]:
    """Every value as text; `datasets` would make numbers of "1" and nothing of "NA"."""
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise DataError(f"{name}:{rows.line_num}: it has other columns than the header; mend the line")
                yield f"{name}:{rows.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{name}:{rows.line_num + 1}: not CSV in UTF-8 ({error}); mend the line") from error


def _parquet(path: Path, name: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:  # a cache by path would go stale when the file changes
        try:
            table = Dataset.from_parquet(str(path), cache_dir=scratch, keep_in_memory=True)
        except Exception as error:  # pyarrow and datasets each raise their own
            if is_disk_full(error):
                raise
            raise DataError(f"{name}: not Parquet ({error.__cause__ or error}); write it anew") from error
        for number, row in enumerate(table, start=1):
            assert isinstance(row, dict)
            yield f"{name} row {number}", row


_READERS = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
