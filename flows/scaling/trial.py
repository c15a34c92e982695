"""One trial of a sweep: the stages up to the training, in a working tree of its own with other parameters.

A trial is ranked by its validation loss and never sees the test rows. A selection by the test rows would make the best
of many trials look better than it is, and the gate would accept it.

The trees share DVC's cache. Unchanged stages come from the cache, and so does the best trial once its parameters are in
params.yaml: nothing is trained twice.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flows.errors import PipelineError, RepositoryError, StageStopped
from flows.params import apply_overrides
from flows.paths import Paths
from flows.runtime.git import Git
from flows.runtime.project import dvc, stage_order
from flows.runtime.stage_process import run_stage
from flows.runtime.worktree import worktree_at
from flows.training.log import TrainingLog
from peftcore.errors import PeftError

Report = Callable[[int, float], str | None]
"""A function of (number of the evaluation, from 1; its validation loss) that returns a reason to stop, or None."""


@dataclass(frozen=True)
class SweepSettings:
    """Settings of all trials of a sweep.

    Attributes:
        root: the repository.
        commit: commit of the code and the parameters.
        stage_timeout: time limit for each stage, in seconds.
        limit: a concurrency limit of Prefect; each trial occupies one slot.
    """

    root: Path
    commit: str
    stage_timeout: float
    limit: str | None = None


@dataclass(frozen=True)
class Trial:
    """The result of one set of parameters.

    Attributes:
        overrides: the parameters.
        seconds: wall clock.
        summary: the training's summary; None if the trial failed.
        error: the reason of the failure.
        lock: text of the trial's dvc.lock.
        params: text of the trial's params.yaml.
        pruned: why the training was stopped before its end; None if it was not.
    """

    overrides: tuple[str, ...]
    seconds: float
    summary: dict[str, Any] | None = None
    error: str | None = None
    lock: str | None = None
    params: str | None = None
    pruned: str | None = None

    @property
    def loss(self) -> float | None:
        """The best validation loss (nats, of the training's objective); None if the trial failed."""
        return None if self.summary is None else float(self.summary["best_validation_loss"])


def snapshot(root: Path) -> str:
    """Commit the tracked files as they are now, and dvc.lock, on no branch; returns the commit."""
    lock = ["dvc.lock"] if (root / "dvc.lock").exists() else []
    return Git(root).snapshot(["."], lock, {}, "Sweep")


def run_trial(settings: SweepSettings, overrides: tuple[str, ...], report: Report | None = None) -> Trial:
    """Train with these parameters. An error of the pipeline becomes the trial's error.

    Args:
        settings: settings of the sweep.
        overrides: the parameters.
        report: gets each validation loss while the training runs; a text stops the training, and is the reason.
    """
    started, watch = time.monotonic(), _Watch(report)
    try:
        with _slot(settings.limit), worktree_at(settings.root, settings.commit) as tree:
            started = time.monotonic()  # the wait for a slot does not count
            try:
                summary = _trained(tree, settings, overrides, watch)
            except StageStopped:
                summary = None
            lock, params = ((tree / name).read_text(encoding="utf-8") for name in ("dvc.lock", "params.yaml"))
    except (PeftError, PipelineError) as error:
        return Trial(overrides, time.monotonic() - started, error=str(error))
    return Trial(overrides, time.monotonic() - started, summary, None, lock, params, watch.reason)


def _trained(tree: Path, settings: SweepSettings, overrides: tuple[str, ...], watch: "_Watch") -> dict[str, Any]:
    paths = Paths(tree)
    apply_overrides(paths.params, overrides)
    if sources := [name for name in Git(tree).run("ls-files", "-z", "*.dvc").split("\0") if name]:
        dvc(tree, "checkout", *sources)
    for stage in stage_order(tree, paths.training):
        should_stop = None if watch.report is None else partial(watch.should_stop, paths)
        run_stage(tree, stage, settings.stage_timeout, should_stop=should_stop)
    return json.loads(paths.training_summary.read_text(encoding="utf-8"))


class _Watch:
    """Reads the validation losses of a running training from its log, and passes each of them to `report` once."""

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self.reason: str | None = None
        self._seen = 0

    def should_stop(self, paths: Paths) -> bool:
        """Return True if `report` gave a reason to stop."""
        assert self.report is not None
        losses = [
            record["validation_loss"]
            for path in paths.checkpoints.glob("*/log.jsonl")  # a trial's tree has one run
            for record in TrainingLog(path).records()
            if record["validation_loss"] is not None
        ]
        for number, loss in enumerate(losses[self._seen :], self._seen + 1):
            self._seen = number
            self.reason = self.reason or self.report(number, loss)
        return self.reason is not None


@contextmanager
def _slot(limit: str | None) -> Iterator[None]:
    """Occupy a slot of a concurrency limit. `strict`, because Prefect otherwise ignores a limit that does not exist."""
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
            f"no slot of Prefect's concurrency limit {limit!r} ({error}); "
            f"create the limit with `prefect gcl create {limit} --limit 1`"
        ) from error
