"""Shell completion for the pipeline in the current folder: stages, versions, parameter keys and metric keys.

Completion runs at every press of Tab, so this module reads dvc.yaml, params.yaml, metrics.json and git's tags itself,
without DVC and torch. `flows.registry.reader` describes the tags. Outside of a pipeline, or if a file is invalid, there
are no completions.
"""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_VERSION = re.compile(r"v\d+\.\d+\.\d+")


def stages(incomplete: str) -> list[str]:
    """Complete stages of dvc.yaml."""
    return _fitting(_yaml("dvc.yaml").get("stages") or {}, incomplete)


def versions(incomplete: str) -> list[str]:
    """Complete registered versions, newest tag first, without withdrawn versions."""
    tags = _git("tag", "--list", "--sort=-creatordate", f"{_name()}@*")
    words = [tag.partition("@")[2] for tag in tags]
    withdrawn = {word.partition("!")[0] for word in words if "!" in word}
    return _fitting([word for word in words if _VERSION.fullmatch(word) and word not in withdrawn], incomplete)


def versions_and_holders(incomplete: str) -> list[str]:
    """Complete the registry's stages, such as champion, and after them the registered versions."""
    tags = _git("tag", "--list", f"{_name()}#*")
    held = dict.fromkeys(tag.split("#")[1].removesuffix("!") for tag in tags)
    return [*_fitting(held, incomplete), *versions(incomplete)]


def params(incomplete: str) -> list[str]:
    """Complete dotted keys of params.yaml, such as `train.learning_rate=`."""
    return _fitting((f"{key}=" for key in _keys(_yaml("params.yaml"))), incomplete)


def metrics(incomplete: str) -> list[str]:
    """Complete dotted keys of metrics.json, such as `adapter.loss`."""
    root = _root()
    path = root / "metrics.json" if root else None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    except ValueError:
        metrics = {}
    return _fitting(_keys(metrics), incomplete)


def _root() -> Path | None:
    from flows.errors import RepositoryError
    from flows.runtime.project import find_root

    try:
        return find_root()
    except RepositoryError:
        return None


def _yaml(name: str) -> Mapping[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    root = _root()
    try:
        values = YAML(typ="safe").load(root / name) if root else None
    except (OSError, ValueError, YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _name() -> str:
    section = _yaml("params.yaml").get("project")
    return section.get("name", "docstrings") if isinstance(section, dict) else "docstrings"


def _git(*arguments: str) -> list[str]:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=_root(), capture_output=True, encoding="utf-8", errors="replace", check=False)
    return done.stdout.split()


def _keys(tree: Any, before: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _fitting(words: Any, incomplete: str) -> list[str]:
    return [word for word in map(str, words) if word.startswith(incomplete)]
