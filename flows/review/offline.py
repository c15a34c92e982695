"""Runs in W&B's offline folders, read by `wandb leet inspect`.

This command is W&B's only public reader of its log since release 0.31. It reads the log of a killed run or a damaged
file, skips records with a wrong checksum, and reports them; the reports become the run's warnings. Most of its half
second is Python's start, so the binary behind the command is started directly, and the command only if that fails.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.errors import ReviewError
from flows.review.run import Run, Sample, flat, series

READERS = min(8, os.cpu_count() or 1)
SECONDS = 120
"""Time limit for one file."""
INTERNAL = ("_wandb", "_runtime", "_step", "_timestamp")
TABLE_BYTES = 64 * 2**20
"""Largest size of a table of samples that is read."""


@dataclass
class _Log:
    """Content of a log, gathered from its records."""

    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Records of the history, each with its step."""
    state: str = "unfinished"

    def add(self, kind: Any, content: dict[str, Any]) -> None:
        """Add a record. Records of other kinds are skipped."""
        if kind == "run":
            self.run |= content
            self.config |= content.get("config", {}).get("update", {})
        elif kind == "config":
            self.config |= content.get("update", {})
        elif kind == "summary":
            self.summary |= content.get("update", {})
        elif kind == "history":
            self.rows.append({"_step": content.get("step", {}).get("num", 0), **content.get("item", {})})
        elif kind == "exit":
            self.state = "failed" if content.get("exit_code") else "finished"


def find(folder: Path) -> list[Path]:
    """Return the `.wandb` files of a run's folder, of a folder with such folders (such as `wandb`), or the file itself.

    Raises:
        ReviewError: there is no such file.
    """
    if folder.is_file() and folder.suffix == ".wandb":
        return [folder]
    for pattern in ("run-*.wandb", "*run-*/run-*.wandb", "wandb/*run-*/run-*.wandb"):
        files = {path.resolve() for path in folder.glob(pattern)}  # `latest-run` is a link to one of the others
        if files:
            return sorted(files)
    raise ReviewError(
        f"{folder} holds no W&B run; give a folder such as wandb/offline-run-20260101_120000-abc123, "
        "one that holds several such as wandb, or one of their .wandb files"
    )


def read(files: Iterable[Path]) -> list[Run]:
    """Return the runs of `.wandb` files, in their order. Raises ReviewError if a file has no run."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_read, files))


def _read(path: Path) -> Run:
    records, warnings = _records(path)
    log = _Log()
    for record in records:
        kind = record.get("type")
        content = record.get(kind) if isinstance(kind, str) else None
        if isinstance(content, dict):
            log.add(kind, content)
    if not log.run:
        reason = "; ".join(warnings) or "it has no record of a run"
        raise ReviewError(f"{path} has no readable W&B run ({reason}); leave it out, or sync it again")
    if log.state == "unfinished":
        warnings = [f"the run was not finished: {len(log.rows)} of its history records are there", *warnings]
    figures = flat(log.summary)
    samples, more = _samples(path.parent / "files", figures.get("samples.path"))
    identity = str(log.run.get("run_id", path.stem.removeprefix("run-")))
    return Run(
        id=identity,
        name=str(log.run.get("display_name") or identity),
        where=str(path.parent),
        started=_moment(log.run.get("start_time")),
        state=log.state,
        config={key: value for key, value in flat(log.config).items() if not key.startswith(INTERNAL)},
        summary={
            key: value for key, value in figures.items() if not key.startswith((*INTERNAL, "samples.", "slices."))
        },
        history=series(log.rows, "_step"),
        samples=samples,
        version=_text(figures.get("registry.version")),
        warnings=(*warnings, *more),
    )


def _records(path: Path) -> tuple[Iterator[dict[str, Any]], list[str]]:
    """Return the file's records and W&B's messages about the file."""
    try:
        from wandb.util import get_core_path

        core = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", path, path.parent]
        done = _output(core)
        if done.returncode:
            done = _output([sys.executable, "-m", "wandb", "leet", "inspect", "--json", path])
    except subprocess.TimeoutExpired as error:
        raise ReviewError(f"{path} was not read within {SECONDS} seconds; check its disk") from error
    messages = [line.removeprefix("wandb leet inspect: ") for line in done.stderr.decode(errors="replace").splitlines()]
    if done.returncode:
        reason = " ".join(messages)[-400:]
        raise ReviewError(f"{path} cannot be read: {reason}; `pip install -U wandb` if wandb is too old")
    return (json.loads(line) for line in done.stdout.splitlines()), list(dict.fromkeys(messages))


def _output(command: Sequence[str | Path]) -> "subprocess.CompletedProcess[bytes]":
    environment = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=SECONDS)


def _samples(files: Path, name: Any) -> tuple[tuple[Sample, ...], list[str]]:
    """Read a run's table of samples in its folder `files`; returns the samples and warnings. The log gives the name."""
    if not isinstance(name, str):
        return (), []
    path = (files / name).resolve()
    if not path.is_relative_to(files.resolve()):
        return (), [f"its table of samples lies outside of its folder ({name}) and is not read"]
    try:
        if path.stat().st_size > TABLE_BYTES:
            return (), [f"its table of samples has more than {TABLE_BYTES} bytes and is not read"]
        return table_rows(json.loads(path.read_bytes())), []
    except (OSError, ValueError) as error:
        return (), [f"its table of samples cannot be read: {error}"]


def table_rows(table: Any) -> tuple[Sample, ...]:
    """Return the rows of a W&B table, {"columns": [...], "data": [[...], ...]}. Raises ValueError for other values."""
    try:
        columns = [str(name) for name in table["columns"]]
        return tuple(dict(zip(columns, map(_cell, row), strict=True)) for row in table["data"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a table of W&B: {error}") from error


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _moment(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
