"""Inputs of a running stage, as dvc.yaml names them.

DVC reads parameters and dependencies for dvc.lock after the stage's command has ended. If one of them changes while the
stage runs, dvc.lock would state an input that the stage has not used.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from peftcore.files import sha256

LARGEST_HASHED = 4 << 20
"""Size of the largest file whose content is compared (bytes); the weights of a base would take too long."""


def stage_inputs(root: Path, stage: str) -> dict[str, object]:
    """Return {input of a stage: its value, or the sizes and times of its files}; {} if dvc.yaml has no such stage."""
    entry = (_read(root / "dvc.yaml") or {}).get("stages", {}).get(stage, {})
    inputs: dict[str, object] = {}
    contents: dict[str, Any] = {}
    for file, keys in _params(entry.get("params", [])):
        if file not in contents:
            contents[file] = _read(root / file)
        inputs |= {f"{key} of {file}": _at(contents[file], key) for key in keys} or {file: contents[file]}
    for name in entry.get("deps", []):
        inputs[str(name)] = _files(root / str(name))
    return inputs


def changed_inputs(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Return the names of inputs that differ between two results of `stage_inputs`."""
    return [name for name in before | after if before.get(name) != after.get(name)]


def _params(entries: Sequence[str | dict[str, list[str] | None]]) -> Iterator[tuple[str, list[str]]]:
    """Give each file with the keys that a list of dvc.yaml names; no keys: the whole file."""
    for entry in entries:
        if isinstance(entry, str):
            yield "params.yaml", [entry]
        else:
            yield from ((file, keys or []) for file, keys in entry.items())


def _read(file: Path) -> Any:
    """Return the values of a YAML file; None if it is absent or cannot be read, as while an editor writes it."""
    try:
        return YAML(typ="safe").load(file)
    except (OSError, UnicodeDecodeError, YAMLError):
        return None


def _at(values: Any, key: str) -> object:
    """Return the value at a key with dots; None if there is none."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _files(path: Path) -> list[tuple[str, object]]:
    """Return each file of a folder, or the file, with its state; Python's own caches of modules are left out."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return [(str(one), _state(one)) for one in files if "__pycache__" not in one.parts]


def _state(file: Path) -> object:
    """Return the digest of a small file, size (bytes) and time (nanoseconds) of a large one; None if it is absent."""
    try:
        status = file.stat()
        return sha256(file) if status.st_size <= LARGEST_HASHED else (status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        return None
