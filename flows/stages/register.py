"""register: the run as a version. Push its files to the DVC remote, commit its record, and tag the commit.

The tag comes last, so a failure before it registers nothing. The same adapter with the same evaluation is the same
version, unless garbage collection removed that version's files. Another evaluation of the adapter is a version of its
own, because the gate uses the evaluation in the record. The commit also holds a model card.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from flows.base.identity import have_same_base
from flows.errors import RegistryConflict
from flows.gate.holdout_reuse import data_digest, evaluated_on, trials_on
from flows.params import Params
from flows.paths import Paths
from flows.registry.card import CARD, model_card
from flows.registry.commit_files import check_no_secrets, data_files
from flows.registry.lineage import (
    LOCK,
    adapter_files,
    check_artifact_name,
    collect,
    content_digest,
    evidence_digests,
    headline_metrics,
    lock_text,
    read_lock,
)
from flows.registry.project_registry import registry_of
from flows.registry.registry import Registry, Version
from flows.registry.synchronise import synchronise
from flows.runtime.git import Git
from flows.runtime.project import dvc, is_experiment
from flows.runtime.stage import start
from flows.runtime.tracking import mirror_version
from flows.webhooks import Event, TagProof, announced
from peftcore.files import write_atomically

logger = logging.getLogger("flows.register")  # as a program this module is called __main__
NAME = "register"
ATTEMPTS = 20
"""Number of version numbers to try while other clones register too."""


def run(params: Params, paths: Paths) -> None:
    """Write metrics.json and artifacts/version.json, and create the version's tag.

    In a DVC experiment, such as a trial, the tag is in DVC's copy of the repository alone, nobody is told of it, and no
    file is pushed.

    Raises:
        RepositoryError: There is no git commit, no current dvc.lock, or no DVC remote.
        RegistryConflict: Another registration took the number at the same time.
    """
    git = Git(paths.root)
    is_trial = is_experiment(paths.root)
    if is_trial:
        params = _without_listeners(params)
    check_artifact_name(paths.root, params.project.name)
    lock = read_lock(paths.root, without=NAME)
    check_no_secrets(git, paths.root)
    data, pointers = data_files(paths, git)
    if not is_trial:
        # dvc.yaml stands for all of its stages, and naming each takes DVC 3 seconds longer
        dvc(paths.root, "push", "--remote", params.register.remote, "dvc.yaml", *pointers)
    metrics = as_text(headline_metrics(paths))
    write_atomically(paths.metrics, metrics)

    registry = registry_of(params, paths.root, sign=True)
    if params.register.git_remote is not None:
        synchronise(registry, params.register.git_remote)
    content = content_digest(adapter_files(paths.adapter))
    registered_version = registry.registered(content, evidence_digests(paths))
    if registered_version is not None:
        write_atomically(paths.version, as_text(registry.record(registered_version)))
        logger.info("this adapter with this evaluation is already %s %s", registry.name, registered_version.number)
        return

    version, record = _register(registry, params, paths, git, lock, content, metrics, data)
    if is_trial:
        logger.info("a trial is no version, so nothing is registered")
    else:
        logger.info("registered %s", version.tag)
    mirror_version(params, paths, record, None if is_trial else version.commit, registry.stages())


def _without_listeners(params: Params) -> Params:
    """Return parameters with which a version's tag reaches neither a git remote nor a webhook's receiver."""
    register = params.register.model_copy(update={"git_remote": None})
    return params.model_copy(
        update={"register": register, "webhooks": params.webhooks.model_copy(update={"endpoints": []})}
    )


def _register(
    registry: Registry,
    params: Params,
    paths: Paths,
    git: Git,
    lock: dict[str, Any],
    content: str,
    metrics: str,
    data: Sequence[str],
) -> tuple[Version, dict[str, Any]]:
    """Register under the next free number; returns the version and its record.

    If a git remote assigns numbers, a number that another clone took meanwhile is skipped.
    """
    remote = params.register.git_remote
    for attempt in range(ATTEMPTS):
        number = next_number(registry, params, paths, git, lock)
        record = collect(params, paths, git, lock, number)
        on_these_rows = evaluated_on(registry, record["evaluation_set"]) + 1
        record["holdout_reuse"] = {"test_rows": on_these_rows, "trials": trials_on(paths, data_digest(lock, paths))}
        contents = {LOCK: lock_text(lock), paths.metrics.name: metrics, CARD: model_card(record)}
        tag = registry.version_tag(number)
        event = Event("candidate", registry.name, f"{tag} {content}", _announcement(record, tag, content))
        try:
            with announced(params, paths.root, event, TagProof(tag, f"sha256:{content}", remote)):
                version = registry.register(number, content, record, contents, summary(record), data, remote)
        except RegistryConflict:
            if remote is None or attempt + 1 == ATTEMPTS:
                raise
            synchronise(registry, remote)
        else:
            write_atomically(paths.version, as_text(record))
            return version, record
    raise AssertionError("the last attempt raises")


def _announcement(record: dict[str, Any], tag: str, content: str) -> dict[str, Any]:
    """Return the details of the webhook's event."""
    return {
        "version": record["version"],
        "tag": tag,
        "adapter": f"sha256:{content}",
        "summary": f"{record['name']} {record['version']} is registered: {summary(record)}",
        "metrics": record["metrics"],
    }


def as_text(value: Any) -> str:
    """Return indented JSON with a final newline."""
    return json.dumps(value, indent=2) + "\n"


def next_number(registry: Registry, params: Params, paths: Paths, git: Git, lock: dict[str, Any]) -> str:
    """Return the version number for this run: one patch step or one minor step above the highest number so far.

    The step is a patch if the run and the latest version are comparable: same base and same test rows. Otherwise the
    step is minor, also if `gto register` made the latest version. The first version is v0.1.0.

    Raises:
        RegistryError: The latest version has no usable record.
    """
    versions = registry.versions()
    if not versions and git.is_shallow():
        first = registry.version_tag(registry.next_number(minor=True))
        logger.warning(
            "this clone is shallow and has no tag of a version, so this run becomes %s; if a git remote has versions, "
            "undo it by `git tag --delete %s`, `peftcore registry fetch REMOTE` and `peftcore stage register --force`",
            first,
            first,
        )
    if not versions or versions[-1].content is None:
        return registry.next_number(minor=True)
    before = registry.record(versions[-1])
    now = collect(params, paths, git, lock, "")
    comparable = before["evaluation_set"] == now["evaluation_set"] and have_same_base(before, now)
    return registry.next_number(minor=not comparable)


def summary(record: dict[str, Any]) -> str:
    """Return one line about a version's test loss."""
    base, adapter = record["metrics"]["base"], record["metrics"]["adapter"]
    return f"test loss {base['loss']:.3f} -> {adapter['loss']:.3f}"


if __name__ == "__main__":
    start(run)
