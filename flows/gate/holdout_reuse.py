"""Reuse of the holdout: how many candidates were compared on the same test rows or against the same champion.

A gate that passes 3 % of the candidates that are no better passes one of many candidates with a far higher
probability (multiple testing). Nothing here corrects for this. The counts are recorded and shown to people.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.gate.candidate import HoldoutReuse
from flows.paths import Paths
from flows.registry.reader import Assignment, RegistryReader, Version
from flows.runtime.git import Git
from flows.runtime.locks import exclusive
from peftcore.files import write_atomically

RECORD_KEYS = ("holdout_reuse", "looks")
"""Keys of the counts in a lineage record: the present one, and that of releases before 0.2."""


def evaluated_on(registry: RegistryReader, evaluation_set: str, until: Version | None = None) -> int:
    """Return the number of versions that were evaluated on certain test rows.

    Args:
        registry: the registry.
        evaluation_set: SHA-256 of the test rows.
        until: the last version to count; None counts all.
    """
    versions = [one for one in registry.versions() if until is None or one.parts <= until.parts]
    return sum(record["evaluation_set"] == evaluation_set for record in registry.records(versions).values())


def reuse_of(registry: RegistryReader, version: Version, holder: Assignment | None) -> HoldoutReuse:
    """Return the counts for a registered version that is compared with the stage's present holder."""
    record = registry.record(version)
    since = 0 if holder is None else holder.created
    later = [one for one in registry.versions() if one.created >= since and one.parts <= version.parts]
    recorded = next((record[key] for key in RECORD_KEYS if key in record), {})
    on_these_rows = evaluated_on(registry, record["evaluation_set"], version)
    return HoldoutReuse(on_these_rows, recorded.get("trials", 0), 0 if holder is None else len(later))


def data_digest(lock: Mapping[str, Any], paths: Paths) -> str | None:
    """Return DVC's digest of the prepared data from a dvc.lock; None if the lock has none."""
    name = paths.data.relative_to(paths.root).as_posix()
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", [])]
    return next((out.get("md5") for out in outs if out["path"] == name), None)


def trials_on(paths: Paths, data: str | None) -> int:
    """Return the number of parameter sets that this clone has tried on the prepared data with this digest."""
    return len(_read_trials(_first_tree(paths)).get(data or "", []))


def note_trial(paths: Paths, lock: str, parameters: str) -> None:
    """Add a trial's parameters to those that this clone has tried on the trial's prepared data (see `trials_on`).

    Equal parameters on the same data count once. A trial whose dvc.lock names no prepared data is not counted.

    Args:
        paths: the paths of any working tree of the clone.
        lock: the text of the trial's dvc.lock.
        parameters: the text of the trial's params.yaml.
    """
    data = data_digest(YAML(typ="safe").load(lock), paths)
    if data is None:
        return
    digest, paths = hashlib.sha256(parameters.encode()).hexdigest(), _first_tree(paths)
    with exclusive(paths.root / ".dvc" / "tmp" / "peftcore-trials.lock"):  # agents of a sweep end at the same time
        trials = _read_trials(paths)
        trials[data] = sorted({*trials.get(data, []), digest})
        paths.trials.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(paths.trials, json.dumps(trials, indent=2) + "\n")


def _first_tree(paths: Paths) -> Paths:
    """Return the paths of the clone's main working tree, where the counts are stored for all working trees."""
    git = Git(paths.root)
    return Paths(git.main_top() / git.prefix)


def _read_trials(paths: Paths) -> dict[str, list[str]]:
    path: Path = paths.trials
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
