"""Examples from any source: docstrings of the standard library, or rows of JSONL, CSV or Parquet, local or on the hub.

`flows.data.formats` defines a row's columns. Faulty rows are reported together, by file and line.
"""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.base.hub import DownloadError, download
from flows.data import docstrings, files, formats
from flows.data.canonical import canonical
from flows.data.examples import (
    AnyExample,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    Retrieval,
    Tagged,
    Translation,
    UnpairedPreference,
    with_system_prompt,
)
from flows.data.formats import FaultyRow, spelled_otherwise
from flows.data.turns import REASONING
from flows.errors import DataError
from flows.params import Data

SHOWN = 10
"""Maximum number of faulty rows that an error lists; the error counts all."""
WATCHED = "data"
"""Folder of the repository that the prepare stage depends on in dvc.yaml."""
log = logging.getLogger(__name__)


def read_examples(data: Data, root: Path) -> list[AnyExample]:
    """Return all examples of `data.source`, or of all sources of `data.mixture`.

    The location of an example of a mixture begins with the name of its source, which is also its slice if no column
    names the slices.

    Args:
        data: The section of params.yaml.
        root: Folder that a relative path starts from.

    Raises:
        DataError: A source is missing or empty, a row is faulty, or `data.new_files` or `data.quarantined` names a file
            that is not there.
    """
    if not data.mixture:
        single, names = _read(data, root)
        _check_names(data, names)
        return single
    examples: list[AnyExample] = []
    known: list[str] = []
    for one in data.mixture:
        alone = data.model_copy(update={"source": one.source, "mixture": []})
        part, names = _read(alone, root)
        known += [f"{one.name}/{name}" for name in names]
        for example in part:
            slice_ = example.slice if data.slice_column else one.name
            where = f"{one.name}/{example.where}"
            examples.append(replace(example, source=one.name, where=where, slice=slice_))
    _check_names(data, known)
    return examples


def _check_names(data: Data, known: list[str]) -> None:
    """Raise DataError if `data.new_files` or `data.quarantined` has other names than those of the files."""
    for key, names in (("new_files", data.new_files), ("quarantined", data.quarantined)):
        if unknown := [name for name in names or () if name not in known]:
            more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
            raise DataError(
                f"data.{key} names {', '.join(unknown)}, and data.source {data.source} has no such file; it has "
                f"{', '.join(known[:SHOWN])}{more}; correct the names, or remove them"
            )


def _read(data: Data, root: Path) -> tuple[list[AnyExample], list[str]]:
    """Return the examples of one source and the names of its files, with which locations begin.

    The demonstration has modules in place of files.
    """
    if data.source == "stdlib:docstrings":
        modules = docstrings.read(data.system_prompt)
        return list(modules), list(dict.fromkeys(example.group for example in modules))
    if data.source.startswith("hub:"):
        try:
            path = download(data.source, "dataset")
        except DownloadError as error:
            raise DataError(
                f"data.source {data.source}: the download failed: {error}. Check the name and the network, or give "
                "the path of a file that is already here"
            ) from error
    else:
        path = root / Path(data.source).expanduser()
        if not path.exists() and (pointer := path.with_name(f"{path.name}.dvc")).exists():
            raise DataError(
                f"data.source {data.source}: DVC tracks it ({pointer.name}), and its content is not here; run "
                f"`dvc pull {data.source}`"
            )
        if not path.resolve().is_relative_to((root / WATCHED).resolve()):
            log.warning(
                "data.source %s is outside %s/, which DVC watches; after changing it, run "
                "`peftcore stage prepare --force`",
                data.source,
                WATCHED,
            )
    examples, faults, unused = [], [], Counter[str]()
    for where, row in files.read_rows(path, data.source, data.kind):
        if data.kind == "chat" and (columns := formats.unused_answer(row)) is not None:
            unused[columns] += 1
        try:
            examples.append(as_example(data, where, row))
        except FaultyRow as fault:
            faults.append(f"{where}: {fault}")
    refuse_faulty(faults, f"data.source {data.source}")
    for columns, count in unused.items():
        log.warning(
            "data.source %s: %d rows have turns (messages or conversations) and also %s, which are left out; remove "
            "the columns that you do not mean",
            data.source,
            count,
            columns,
        )
    if not examples:
        raise DataError(f"data.source {data.source}: it has no rows; give a file that has some")
    return examples, list(files.row_files(path, data.kind))


def comes_from(where: str, names: list[str]) -> bool:
    """Return True if a row's location, such as `week3.jsonl:12` or `week3.parquet row 12`, is in one of the files."""
    return where.startswith(tuple(f"{name}{mark}" for name in names for mark in (":", " row ")))


def refuse_faulty(faults: list[str], of: str) -> None:
    """Raise DataError if there are faulty rows; the message counts all and lists the first."""
    if not faults:
        return
    more = [f"  ... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    listed = "\n".join([*(f"  {fault}" for fault in faults[:SHOWN]), *more])
    raise DataError(f"{of}: {len(faults)} rows cannot be used; correct or remove them:\n{listed}")


def as_example(data: Data, where: str, row: dict[str, Any]) -> AnyExample:
    """Return a row as an example. Raises FaultyRow if it is not of `data.kind`. where: its location, for messages."""
    if data.kind == "text":
        content = formats.document(row)
        return Document(content, **_origin(data, where, row, content))
    if data.kind == "classification":
        text, label = formats.labelled(row)
        return Labelled(text, label, **_origin(data, where, row, text))
    if data.kind == "token_classification":
        words, tags = formats.tagged(row, data.tag_scheme)
        return Tagged(words, tags, **_origin(data, where, row, " ".join(words)))
    if data.kind == "seq2seq":
        source, target = formats.source_and_target(row)
        return Translation(source, target, **_origin(data, where, row, source))
    if data.kind == "retrieval":
        query, positive, negatives = formats.retrieval(row)
        return Retrieval(query, positive, negatives, **_origin(data, where, row, query))
    ignored = (*data.ignored_fields, *(REASONING if data.reasoning == "none" else ()))
    if data.kind == "preference":
        prompt, chosen, rejected = formats.preference(row, ignored)
        origin = _origin(data, where, row, prompt)
        prompt = with_system_prompt(prompt, data.system_prompt)
        margin = None if data.margin_column is None else formats.margin(row, data.margin_column)
        return Preference(prompt, chosen, rejected, formats.tools(row), margin, **origin)
    if data.kind == "unpaired_preference":
        prompt, completion, desirable = formats.unpaired_preference(row, ignored)
        origin = _origin(data, where, row, prompt)
        prompt = with_system_prompt(prompt, data.system_prompt)
        return UnpairedPreference(prompt, completion, desirable, formats.tools(row), **origin)
    turns = formats.chat(row, ignored)
    messages = with_system_prompt(turns, data.system_prompt)
    return Example(messages, formats.tools(row), **_origin(data, where, row, turns[:-1]))


def _origin(data: Data, where: str, row: dict[str, Any], question: str | list[Message]) -> dict[str, Any]:
    """Return the fields of `Origin`. question: the text, or the turns before the last answer."""
    group = _digest(question) if data.group_column is None else _column(row, data.group_column, "group_column")
    slice_ = "all" if data.slice_column is None else _column(row, data.slice_column, "slice_column")
    extra = _extra(data, row) if data.extra_columns else None
    return {"group": group, "slice": slice_, "where": where, "weight": formats.weight(row), "extra": extra}


def _extra(data: Data, row: dict[str, Any]) -> str:
    for column in data.extra_columns:
        if column not in row:
            hint = spelled_otherwise(row, [column])
            raise FaultyRow(f"it has no {column} (data.extra_columns); its columns are {', '.join(row)}{hint}")
    return json.dumps({column: row[column] for column in data.extra_columns}, ensure_ascii=False, default=str)


def _digest(question: str | list[Message]) -> str:
    """Return a digest of a question that does not depend on the row's location, answer or spelling."""
    if isinstance(question, str):
        content: Any = canonical(question)
    else:
        content = [[turn["role"], canonical(turn["content"]), turn.get("tool_calls")] for turn in question]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _column(row: dict[str, Any], column: str, parameter: str) -> str:
    value = row.get(column)
    # pandas writes a missing number as NaN; rows without a group are no group
    if value is None or value != value or not str(value).strip():
        hint = spelled_otherwise(row, [column])
        raise FaultyRow(f"it has no {column} (data.{parameter}); its columns are {', '.join(row)}{hint}")
    # a column of whole numbers becomes one of floats as soon as a number is missing
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
