"""Examples from any source: the standard library's docstrings, or rows of JSONL, CSV or Parquet, here or on the hub.

Rows have `messages` (a list of {"role", "content"}), or `prompt` and `completion`. What is wrong with rows is told
all at once, by file and line.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.data import docstrings, files
from flows.data.examples import Example, Message, question_and_answer, with_system_prompt
from flows.errors import DataError
from flows.hub import DownloadError, download
from flows.params import Data

SHOWN = 10
"""How many faulty rows an error lists; it counts them all."""
ROLES = ("system", "user", "assistant")
WATCHED = "data"
"""Folder of the repository that the prepare stage depends on in dvc.yaml."""
log = logging.getLogger(__name__)


def read_examples(data: Data, root: Path) -> list[Example]:
    """All examples of `data.source`; root is what a path is relative to.

    Raises DataError if it is missing or empty, has none of the columns, or any row is faulty.
    """
    if data.source == "stdlib:docstrings":
        return docstrings.read(data.system_prompt)
    if data.source.startswith("hub:"):
        try:
            place = download(data.source, "dataset")
        except DownloadError as error:
            raise DataError(
                f"data.source {data.source}: the download failed: {error}. Check the name and the network, or give "
                "the path of a file that is already here"
            ) from error
    else:
        place = root / Path(data.source).expanduser()
        if not place.resolve().is_relative_to((root / WATCHED).resolve()):
            log.warning(
                "data.source %s is outside %s/, which DVC watches: after changing it, run `dvc repro --force prepare`",
                data.source,
                WATCHED,
            )
    examples, faults = [], []
    for where, row in files.read_rows(place, data.source):
        try:
            examples.append(_example(data, where, row))
        except _FaultyRow as fault:
            faults.append(f"{where}: {fault}")
    refuse_faulty(faults, f"data.source {data.source}")
    if not examples:
        raise DataError(f"data.source {data.source}: it has no rows; give a file that has some")
    return examples


def refuse_faulty(faults: list[str], of: str) -> None:
    """Raise DataError that counts the faulty rows and lists the first of them, if there are any."""
    if not faults:
        return
    more = [f"  ... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    listed = "\n".join([*(f"  {fault}" for fault in faults[:SHOWN]), *more])
    raise DataError(f"{of}: {len(faults)} rows cannot be used; mend or remove them:\n{listed}")


class _FaultyRow(Exception):
    pass


def _example(data: Data, where: str, row: dict[str, Any]) -> Example:
    return Example(
        with_system_prompt(_messages(row, data.system_prompt), data.system_prompt),
        group=_column(row, data.group_column, "group_column", otherwise=where),
        slice=_column(row, data.slice_column, "slice_column", otherwise="all"),
        where=where,
    )


def _messages(row: dict[str, Any], system_prompt: str | None) -> list[Message]:
    if row.get("messages") is not None:
        return _checked(row["messages"])
    if "prompt" in row and "completion" not in row:
        raise _FaultyRow("it has no completion")
    if "prompt" not in row:
        raise _FaultyRow(f"it has neither messages nor prompt and completion, but {', '.join(row) or 'nothing'}")
    for column in ("prompt", "completion"):
        if not isinstance(row[column], str) or not row[column].strip():
            raise _FaultyRow(f"its {column} is {'empty' if not row[column] else 'no text'}")
    return question_and_answer(row["prompt"], row["completion"], system_prompt)


def _checked(value: Any) -> list[Message]:
    """The messages, in the order: system at most first, a user turn before the first answer, an answer last."""
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise _FaultyRow(f"its messages are no JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise _FaultyRow('its messages are no list of {"role": ..., "content": ...}')
    messages = list(_turns(value))
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise _FaultyRow("it has a system turn that is not the first")
    if not roles or roles[-1] != "assistant":
        raise _FaultyRow("it has no completion: its last turn is not the assistant's")
    if "user" not in roles[: roles.index("assistant")]:
        raise _FaultyRow("it has no user turn before the assistant's first")
    return messages


def _turns(value: list[dict[str, Any]]) -> Iterator[Message]:
    for number, message in enumerate(value, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _FaultyRow(f"turn {number} has the role {role!r}; give one of {', '.join(ROLES)}")
        if not isinstance(content, str) or (role != "system" and not content.strip()):
            raise _FaultyRow(f"turn {number} ({role}) has no text as its content")
        yield {"role": role, "content": content}


def _column(row: dict[str, Any], column: str | None, parameter: str, otherwise: str) -> str:
    if column is None:
        return otherwise
    if row.get(column) is None:
        raise _FaultyRow(f"it has no {column} (data.{parameter}); its columns are {', '.join(row)}")
    return str(row[column])
