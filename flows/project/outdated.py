"""Differences between a project's files and the installed version, for projects that `peftcore init` has made.

After an upgrade of the package, dvc.yaml may lack stages, parameters and dependencies. DVC then reruns no stage if such
a parameter changes. After a downgrade, dvc.yaml may have stages that the installed version lacks.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.runtime.stage_code import FILE, installed_version, unknown_stages, without_modules
from flows.runtime.stage_dependencies import PACKAGES


def differences(root: Path) -> list[str]:
    """Return what differs and what to do, a sentence each; [] for a folder that `peftcore init` has not made."""
    try:
        present = YAML(typ="safe").load(root / FILE) if (root / FILE).is_file() else None
        stages = YAML(typ="safe").load(root / "dvc.yaml")["stages"] if present else {}
    except (YAMLError, KeyError, TypeError):
        return []  # the command that reads the file reports it
    return [*_of_version(present, stages), *_of_stages(stages)] if present else []


def _of_version(present: Mapping[str, Any], stages: Mapping[str, Any]) -> Iterator[str]:
    last, now = present.get("peftcore"), installed_version()
    if unknown := unknown_stages(stages):
        yield without_modules(unknown, last)
    elif now is not None and last not in (now, None):
        yield (
            f"peftcore {now} is installed, and this project last ran with {last}: `peftcore run` runs the stages again "
            "whose code differs"
        )


def _of_stages(stages: Mapping[str, Any]) -> Iterator[str]:
    installed = _installed_stages()
    missing = [f"stage {name}" for name in installed if name not in stages]
    if incomplete := [name for name, stage in installed.items() if name in stages and _lacks(stages[name], stage)]:
        missing.append(f"parameters, dependencies or outputs of {', '.join(incomplete)}")
    if missing:
        yield (
            f"dvc.yaml lacks {', and '.join(missing)}, which the installed peftcore has. A change of "
            "these runs no stage again. `peftcore upgrade` shows the difference, `peftcore upgrade --write` writes it"
        )


def _lacks(stage: Mapping[str, Any], installed: Mapping[str, Any]) -> bool:
    """Return True if a stage lacks parameters, dependencies or outputs of the installed one."""
    return any(_names(installed.get(part, ())) - _names(stage.get(part, ())) for part in ("params", "deps", "outs"))


@cache
def _installed_stages() -> Mapping[str, Any]:
    """Return the stages of the installed version; code is left out, because `FILE` stands for it."""
    text = (resources.files("flows.project") / "templates" / "pipeline.yaml").read_text(encoding="utf-8")
    return YAML(typ="safe").load(text)["stages"]


def _names(entries: Any) -> set[str]:
    """Return the names in a list of dvc.yaml, whose entries are names or {name: options}, without installed code."""
    names = {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}
    return {name for name in names if name.partition("/")[0] not in PACKAGES}
