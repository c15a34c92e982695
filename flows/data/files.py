"""Rows of JSONL, CSV, Parquet and CoNLL files, and texts of .txt files, each with its location for error messages."""

import csv
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO, Any

import pyarrow
from pyarrow import parquet

from flows.errors import DataError
from flows.runtime.stage import is_disk_full

logger = logging.getLogger("flows.data")
LONGEST_ROW = 16 << 20
"""Maximum bytes of a row, or characters of a CSV field; about four million tokens."""
LEAST_UNPACKED, MOST_EXPANSION = 1 << 30, 1000
"""Limit of a Parquet file's unpacked size: LEAST_UNPACKED bytes or MOST_EXPANSION times its size, the larger."""
SHOWN = 5
"""Maximum number of unread files that an error lists."""
HIDDEN = "it is hidden (a name with a dot first); rename it if it holds rows"
"""Why a file of rows is not read."""
_UNPACK, _CONVERT = "unpack it", "write it as .csv, .jsonl or .parquet"
_QUOTE = 'correct the row; a quotation mark in a quoted value is written twice ("")'
_ONE_A_LINE = "write one object a line (`jq -c . FILE`; of a list `jq -c '.[]' FILE`)"
_OFTEN_ROWS = {
    ".json": "write one row a line as .jsonl (`jq -c '.[]' FILE.json > FILE.jsonl`)",
    ".ndjson": "name it .jsonl",
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z"), _UNPACK),
    **dict.fromkeys((".tsv", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro", ".pkl"), _CONVERT),
}
"""{suffix of files that often hold rows: how to make them readable}"""
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh91AY&SY": "bzip2",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
"""{first bytes: kind of compression}"""
_LONGEST_START = max(map(len, _COMPRESSED))
_TURNS = (
    *("messages", "conversations", "tools", "functions", "prompt", "completion", "chosen", "rejected"),
    *("input", "preferred_output", "non_preferred_output"),
)
"""Columns of turns and tools, which the model sees with all their fields."""
_BATCH = 256
"""Parquet rows that are read at a time."""

Row = tuple[str, dict[str, Any]]
"""A row's location, such as `chats.jsonl:12`, and its columns."""


def read_rows(place: Path, source: str, kind: str = "chat") -> Iterator[Row]:
    """Yield the rows of a file, or of all readable files below a folder that are not hidden, ordered by name.

    Args:
        place: The file or folder.
        source: The value of data.source, for error messages.
        kind: The value of data.kind; text also reads .txt files, each as one text, and token_classification .conll
            files, each with a word and its tag on a line and an empty line between rows.

    Raises:
        DataError: `place` does not exist, no file is readable, or a file cannot be parsed.
    """
    if not place.exists():
        raise DataError(f"data.source {source}: there is no {place}; give stdlib:docstrings, hub:NAME or a path")
    files = _files(place)
    read = row_files(place, kind)
    shown = (path for name, path in files.items() if not is_hidden(name))
    unread = [f"{path.name}: {hint}" for path in shown if (hint := why_unread(path)) is not None]
    if hidden := [name for name, path in files.items() if is_of_rows(path, kind) and name not in read]:
        more = f" and {len(hidden) - SHOWN} more" if len(hidden) > SHOWN else ""
        unread.append(f"{', '.join(hidden[:SHOWN])}{more}: {HIDDEN}")
    if not read:
        raise DataError(
            f"data.source {source}: {place} is or holds no {', '.join(_suffixes(kind))}; "
            + ("; ".join(unread[-SHOWN:]) or "convert it to one")
        )
    for hint in unread:
        logger.warning("data.source %s: not read: %s", source, hint)
    for name, path in read.items():
        if path.stat().st_size:
            _refuse_compressed(path, name)
            yield from _READERS[path.suffix.lower()](path, name)


def _refuse_compressed(path: Path, name: str) -> None:
    """Raise DataError for a compressed file whose name does not say so."""
    with path.open("rb") as file:
        start = file.read(_LONGEST_START)
    if kind := next((kind for sign, kind in _COMPRESSED.items() if start.startswith(sign)), None):
        raise DataError(f"{name}: the file is compressed ({kind}); {_UNPACK}, and keep the name {path.name}")


def row_files(place: Path, kind: str = "chat") -> dict[str, Path]:
    """Return {name: path} of the files that `read_rows` reads, sorted by path; its locations begin with the name.

    Hidden files of a folder are not read: file managers and editors write them, such as `._rows.jsonl` on macOS. A
    hidden file that is itself the place is read.
    """
    return {
        name: path
        for name, path in _files(place).items()
        if is_of_rows(path, kind) and (path == place or not is_hidden(name))
    }


def _files(place: Path) -> dict[str, Path]:
    if not place.is_dir():
        return {place.name: place} if place.is_file() else {}
    return {path.relative_to(place).as_posix(): path for path in sorted(place.rglob("*")) if path.is_file()}


def is_hidden(name: str) -> bool:
    """Return True if the file or one of its folders begins with a dot. name: the path below the source's folder."""
    return any(part.startswith(".") for part in PurePath(name).parts)


def is_of_rows(path: Path, kind: str = "chat") -> bool:
    """Return True if the file's suffix is that of a readable format; .txt and .conll are for one kind of rows each."""
    return path.suffix.lower() in _suffixes(kind)


def _suffixes(kind: str) -> list[str]:
    return [suffix for suffix in _READERS if _ONLY_FOR.get(suffix, kind) == kind]


def why_unread(path: Path) -> str | None:
    """Return advice on an unreadable file that probably holds rows; None for any other file."""
    return None if is_of_rows(path) else _OFTEN_ROWS.get(path.suffix.lower())


def _lines(file: IO[Any], name: str) -> Iterator[Any]:
    """Yield the lines of a file; raises DataError at a line longer than LONGEST_ROW."""
    for number in itertools.count(1):
        line = file.readline(LONGEST_ROW + 1)
        if not line:
            return
        if len(line) > LONGEST_ROW:
            raise DataError(f"{name}:{number}: the line is longer than {LONGEST_ROW:,} bytes; split the row")
        yield line


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    """Yield (file and line, row) of a JSON-lines file; not read by `datasets`, whose errors name no line."""
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, name), start=1):
            if not (content := line.strip(b"\xef\xbb\xbf \t\r\n")):
                continue
            if content in (b"{", b"["):
                raise DataError(f"{name}:{number}: it begins a JSON value of several lines; {_ONE_A_LINE}")
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except UnicodeDecodeError as error:
                raise DataError(f"{name}:{number}: not JSON in UTF-8 ({error}); write the file in UTF-8") from error
            except (ValueError, RecursionError) as error:  # bad JSON, or endless nesting
                raise DataError(f"{name}:{number}: not JSON ({error}); correct or remove the line") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{name}:{number}: a row is a JSON object, and this is {type(row).__name__}; {_ONE_A_LINE}"
                )
            if b"\\u" in line and not _is_text(row):
                raise DataError(
                    f"{name}:{number}: it holds half of a surrogate pair (\\ud800 to \\udfff), not a character; "
                    "correct or remove the row"
                )
            yield f"{name}:{number}", row


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object; raises ValueError if two have one name, of which `json` keeps the last."""
    if len(value := dict(fields)) < len(fields):
        raise ValueError(f"several fields are called {', '.join(_repeated(name for name, _ in fields))}")
    return value


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _is_text(row: dict[str, Any]) -> bool:
    """Return True if every string of a row can be encoded as UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv(path: Path, name: str) -> Iterator[Row]:
    """Read each value as text; `datasets` would turn "1" into a number and "NA" into null."""
    csv.field_size_limit(LONGEST_ROW)
    line = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(_lines(file, name), "")
            file.seek(0)
            rows = csv.DictReader(_lines(file, name), strict=True, delimiter=_delimiter(header))
            if repeated := _repeated(one for one in rows.fieldnames or () if one):
                raise DataError(f"{name}:1: several columns are called {', '.join(repeated)}; rename all but one")
            line = rows.line_num
            for row in rows:
                line = rows.line_num
                if None in row or None in row.values():
                    raise DataError(f"{name}:{line}: its columns differ from the header's; correct the line")
                yield f"{name}:{line}", row
    except csv.Error as error:
        raise DataError(f"{name}:{line + 1}: not CSV in UTF-8 ({error}); {_QUOTE}") from error
    except UnicodeDecodeError:
        _refuse_other_encoding(path, name)
        raise


def _refuse_other_encoding(path: Path, name: str) -> None:
    """Raise DataError with the first line that is not UTF-8; a text file is decoded lines ahead of the one in use."""
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, name), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{name}:{number}: not UTF-8 ({error}); write the file in UTF-8") from error


def _delimiter(header: str) -> str:
    """Return the column delimiter: a comma if there is one, else a semicolon or tab, which Excel writes."""
    return next((mark for mark in ",;\t" if mark in header), ",")


def _parquet(path: Path, name: str) -> Iterator[Row]:
    """Read by pyarrow, because `datasets` follows paths and addresses that a file names in its columns."""
    limit, number, unpacked = max(LEAST_UNPACKED, MOST_EXPANSION * path.stat().st_size), 0, 0
    try:
        with parquet.ParquetFile(path, memory_map=False) as file:
            if repeated := _repeated(file.schema_arrow.names):
                raise DataError(f"{name}: several columns are called {', '.join(repeated)}; rename all but one")
            for batch in file.iter_batches(_BATCH):
                unpacked += batch.nbytes
                if unpacked > limit:
                    raise DataError(f"{name}: its {path.stat().st_size:,} bytes unpack to over {limit:,}; split it")
                for row in _values(batch, name):
                    number += 1
                    turns = {column: _without_nulls(row[column]) for column in _TURNS if column in row}
                    yield f"{name} row {number}", row | turns
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if is_disk_full(error):
            raise
        raise DataError(f"{name}: not Parquet ({error}); write it again") from error


def _values(batch: pyarrow.RecordBatch, name: str) -> list[dict[str, Any]]:
    """Return the rows of a batch; raises DataError for values that Python lacks, such as a date in the year 12000."""
    columns = {}
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[column] = values.to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError, LookupError) as error:
            raise DataError(
                f"{name}: values of the column {column} cannot be read ({error}); leave the column out, or write it as "
                "text"
            ) from error
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects: each object has the fields of all others in Parquet."""
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text(path: Path, name: str) -> Iterator[Row]:
    """Read a file as one text."""
    if path.stat().st_size > LONGEST_ROW:
        raise DataError(f"{name}: the text is longer than {LONGEST_ROW:,} bytes; split the file")
    try:
        yield f"{name}:1", {"text": path.read_text(encoding="utf-8-sig")}
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not text in UTF-8 ({error}); convert it") from error


def _conll(path: Path, name: str) -> Iterator[Row]:
    """Read rows of words: the first column of a line is a word and the last its tag; an empty line ends a row."""
    words: list[str] = []
    tags: list[str] = []
    begin = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(itertools.chain(_lines(file, name), [""]), start=1):
                columns = re.split("[ \t]+", line.strip())  # a no-break space may be part of a word, such as 10 000
                if columns[0] in ("", _DOCUMENT):
                    if words:
                        yield f"{name}:{begin}", {"tokens": words, "tags": tags}
                    words, tags = [], []
                    continue
                if len(columns) < 2:
                    raise DataError(f"{name}:{number}: it has a word without a tag; write both, with a space or tab")
                begin = begin if words else number
                words.append(columns[0])
                tags.append(columns[-1])
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not text in UTF-8 ({error}); convert it") from error


_TEXT, _CONLL = ".txt", ".conll"
_DOCUMENT = "-DOCSTART-"
"""First word of a line of a CoNLL file that begins a document."""
_READERS = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet, _TEXT: _text, _CONLL: _conll}
_ONLY_FOR = {_TEXT: "text", _CONLL: "token_classification"}
"""{suffix: the only data.kind that reads it}"""
