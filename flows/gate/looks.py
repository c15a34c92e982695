"""The number of tries that a version is the best or the last of.

A gate that passes 3 % of the candidates that are no better passes one of many with a far higher probability. Nothing
here corrects for that; the numbers are recorded and shown, so that people can.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.gate.candidate import Looks
from flows.paths import Paths
from flows.registry.registry import Assignment, Registry, Version
from flows.runtime.git import Git
from flows.runtime.locks import exclusive
from peftcore.files import write_atomically


def evaluated_on(registry: Registry, evaluation_set: str, until: Version | None = None) -> int:
    """How many versions were evaluated on these test rows. until: the last one that counts; None: all."""
    versions = [one for one in registry.versions() if until is None or one.parts <= until.parts]
    return sum(record["evaluation_set"] == evaluation_set for record in registry.records(versions).values())


def looks_of(registry: Registry, version: Version, holder: Assignment | None) -> Looks:
    """Those of a registered version against who has the stage now."""
    record = registry.record(version)
    since = 0 if holder is None else holder.created
    later = [one for one in registry.versions() if one.created >= since and one.parts <= version.parts]
    trials = record.get("looks", {}).get("trials", 0)
    return Looks(evaluated_on(registry, record["evaluation_set"], version), trials, 0 if holder is None else len(later))


def data_digest(lock: Mapping[str, Any], paths: Paths) -> str | None:
    """DVC's digest of the prepared data in a dvc.lock; None where it has none."""
    name = paths.data.relative_to(paths.root).as_posix()
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", [])]
    return next((out.get("md5") for out in outs if out["path"] == name), None)


def trials_on(paths: Paths, data: str | None) -> int:
    """Return how many different parameters were tried on prepared data with this digest, in this clone."""
    return len(_noted(_of_the_clone(paths)).get(data or "", []))


def note_trial(paths: Paths, lock: str, parameters: str) -> None:
    """Count one trial. lock: the text of its dvc.lock; parameters: that of its params.yaml."""
    data = data_digest(YAML(typ="safe").load(lock), paths)
    if data is None:
        return
    digest, paths = hashlib.sha256(parameters.encode()).hexdigest(), _of_the_clone(paths)
    with exclusive(paths.root / ".dvc" / "tmp" / "peftcore-trials.lock"):  # agents of a sweep end at the same time
        noted = _noted(paths)
        noted[data] = sorted({*noted.get(data, []), digest})
        paths.trials.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(paths.trials, json.dumps(noted, indent=2) + "\n")


def _of_the_clone(paths: Paths) -> Paths:
    """Return the paths of the clone's first working tree. A retraining has a tree of its own, without the counts."""
    git_folder = Git(paths.root).common_folder().resolve()
    return Paths(git_folder.parent) if git_folder.name == ".git" else paths


def _noted(paths: Paths) -> dict[str, list[str]]:
    path: Path = paths.trials
    return json.loads(path.read_text()) if path.exists() else {}
