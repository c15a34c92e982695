"""One trial of a sweep: the stages up to the training, in a working tree of its own with other parameters.

A trial is ranked by its validation loss and never sees the test rows: the best of many trials on the test rows would
look better there than it is, and the gate would believe it.

The trees share DVC's cache. A stage that a parameter does not touch is taken from there, and so is the best trial
afterwards, when its parameters are put into params.yaml: nothing is trained twice.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.errors import PipelineError, RepositoryError
from flows.params import apply_overrides
from flows.paths import Paths
from flows.runtime.git import Git
from flows.runtime.project import dvc, stage_order
from flows.runtime.stage_process import run_stage
from flows.runtime.worktree import worktree_at
from peftcore.errors import PeftError


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep have in common.

    commit: of the code and parameters; stage_timeout: seconds; limit: a concurrency limit of Prefect's, of which each
    trial holds one place while it works.
    """

    root: Path
    commit: str
    stage_timeout: float
    limit: str | None = None


@dataclass(frozen=True)
class Trial:
    """What came of one set of parameters. summary: of its training; error: why there is none; lock, params: the texts
    of its dvc.lock and params.yaml.
    """

    overrides: tuple[str, ...]
    seconds: float
    summary: dict[str, Any] | None = None
    error: str | None = None
    lock: str | None = None
    params: str | None = None

    @property
    def loss(self) -> float | None:
        """Its best loss on the validation rows (nats, of the training's objective)."""
        return None if self.summary is None else float(self.summary["best_validation_loss"])


def snapshot(root: Path) -> str:
    """A commit, on no branch, of the tracked files as they are now, dvc.lock with them."""
    lock = ["dvc.lock"] if (root / "dvc.lock").exists() else []
    return Git(root).snapshot(["."], lock, {}, "Sweep")


def run_trial(plan: Plan, overrides: tuple[str, ...]) -> Trial:
    """Train with these parameters; what the pipeline refuses is the trial's error, not the sweep's."""
    started = time.monotonic()
    try:
        with _place(plan.limit), worktree_at(plan.root, plan.commit) as tree:
            started = time.monotonic()  # waiting for a place is no work
            summary = _trained(tree, plan, overrides)
            texts = [(tree / name).read_text() for name in ("dvc.lock", "params.yaml")]
    except (PeftError, PipelineError) as error:
        return Trial(overrides, time.monotonic() - started, error=str(error))
    return Trial(overrides, time.monotonic() - started, summary, None, *texts)


def _trained(tree: Path, plan: Plan, overrides: tuple[str, ...]) -> dict[str, Any]:
    paths = Paths(tree)
    apply_overrides(paths.params, overrides)
    if sources := Git(tree).run("ls-files", "*.dvc").splitlines():
        dvc(tree, "checkout", *sources)
    for stage in stage_order(tree, paths.training):
        run_stage(tree, stage, plan.stage_timeout)
    return json.loads(paths.training_summary.read_text())


@contextmanager
def _place(limit: str | None) -> Iterator[None]:
    """Hold a place of a concurrency limit; strict, since Prefect would else let all pass one that is not there."""
    if limit is None:
        yield
        return
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    try:
        with concurrency(limit, strict=True):
            yield
    except ConcurrencySlotAcquisitionError as error:
        raise RepositoryError(
            f"no place of Prefect's concurrency limit {limit!r} ({error}); "
            f"make it by `prefect gcl create {limit} --limit 1`"
        ) from error
