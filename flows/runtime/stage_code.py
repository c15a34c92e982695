"""Code of the stages as DVC sees it in a project that uses an installed peftcore.

In this repository dvc.yaml lists the source files of each stage. A project has no source files, so each of its stages
depends on one value in `.peftcore/stages.yaml`: a digest of the installed modules that the stage imports. An upgrade
therefore reruns only the stages whose code has changed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.errors import RepositoryError
from flows.runtime.stage_dependencies import is_module, module_files, module_of
from peftcore.files import write_atomically

FILE = ".peftcore/stages.yaml"
HEADER = """\
# Written by peftcore; commit it. A digest of the installed code of each stage, so that an upgrade of peftcore reruns
# only the stages whose code has changed.
"""


def code_digest(module: str) -> str:
    """Return a digest of the modules that can change the results of a stage's module."""
    files = sorted((name, hashlib.sha256(file.read_bytes()).hexdigest()) for name, file in module_files(module).items())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def refresh(root: Path) -> bool:
    """Update `.peftcore/stages.yaml` for the installed version; nothing happens in a repository without this file.

    Args:
        root: Folder with dvc.yaml.

    Returns:
        True if the file has changed.

    Raises:
        RepositoryError: The file or dvc.yaml is not valid YAML, or a stage's module is not installed.
    """
    file = root / FILE
    if not file.is_file():
        return False
    yaml = YAML(typ="safe")
    try:
        present = yaml.load(file) or {}
        stages = yaml.load(root / "dvc.yaml")["stages"]
    except Exception as error:  # ruamel.yaml's errors, and those of a file without stages
        raise RepositoryError(f"{file} or dvc.yaml beside it cannot be read: {error}; restore it from git") from error
    if unknown := unknown_stages(stages):
        raise RepositoryError(without_modules(unknown, present.get("peftcore")))
    named = {name for name, stage in stages.items() if module_of(stage) is not None}
    if present.get("peftcore") == installed_version() and set(present.get("stages", ())) == named:
        return False
    text = stage_file(stages)
    if text == file.read_text(encoding="utf-8"):
        return False
    write_atomically(file, text)
    return True


def unknown_stages(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the stages of dvc.yaml whose modules the installed version lacks."""
    modules = {name: module_of(stage) for name, stage in stages.items()}
    return [name for name, module in modules.items() if module is not None and not is_module(module)]


def without_modules(stages: Sequence[str], last: str | None) -> str:
    """Return what to do about stages of dvc.yaml whose modules the installed version lacks.

    Args:
        stages: Their names.
        last: The version with which the project last ran.
    """
    return (
        f"the installed peftcore ({installed_version() or 'source'}) has no code of {', '.join(stages)} in dvc.yaml; "
        f"this project last ran with {last or 'another version'}: install that version, or a newer one"
    )


def stage_file(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of `.peftcore/stages.yaml`.

    Args:
        stages: The stages of dvc.yaml.
    """
    digests = {name: code_digest(module) for name, stage in stages.items() if (module := module_of(stage)) is not None}
    lines = [
        f'peftcore: "{installed_version() or "source"}"',
        "stages:",
        *(f"  {name}: {d}" for name, d in digests.items()),
    ]
    return HEADER + "\n".join(lines) + "\n"


def installed_version() -> str | None:
    """Return the installed version, whose files never change; None for an editable installation or a source folder."""
    try:
        distribution = metadata.distribution("peftcore")
    except metadata.PackageNotFoundError:
        return None
    listed = distribution.read_text("RECORD") or ""  # an editable installation and a source folder list no modules
    return distribution.version if "flows/runtime/stage_code.py" in listed else None
