"""Counts of comparisons on the same test rows and of trials on the same data."""

import json
from typing import Any

from flows.gate.candidate import HoldoutReuse
from flows.gate.holdout_reuse import data_digest, note_trial, reuse_of, trials_on
from flows.gate.promote import promote
from flows.paths import Paths
from flows.registry.lineage import read_lock
from flows.registry.project_registry import registry_of
from flows.registry.reader import RegistryReader
from flows.runtime.worktree import worktree_at


def test_versions_and_trials_on_the_same_rows_are_counted(registered: Any) -> None:
    promote(registered.params, registered.paths)
    for parameters in ("a: 1", "a: 2", "a: 2"):
        note_trial(registered.paths, (registered.root / "dvc.lock").read_text(), parameters)
    record = registered.register(loss=2.6, weight=2.0)
    assert record["holdout_reuse"] == {"test_rows": 2, "trials": 2}
    digest = data_digest(read_lock(registered.root, "register"), registered.paths)
    with worktree_at(registered.root, "HEAD") as tree:
        assert trials_on(Paths(tree), digest) == 2, "a retraining of this clone knows of them"
    report = promote(registered.params, registered.paths).report
    assert report is not None
    detail = next(check.detail for check in report.checks if check.name == "against the champion")
    assert "version 2 that was evaluated on these test rows" in detail and "2 trials of sweeps" in detail


def test_a_record_of_an_earlier_release_has_its_trials_under_another_key(registered: Any, monkeypatch: Any) -> None:
    record = json.loads(registered.paths.version.read_text())
    registry = registry_of(registered.params, registered.root).snapshot()
    record["looks"] = record.pop("holdout_reuse") | {"trials": 7}
    monkeypatch.setattr(RegistryReader, "record", lambda *_: record)
    assert reuse_of(registry, registry.versions()[0], None) == HoldoutReuse(1, 7, 0)
