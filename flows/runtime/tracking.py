"""Weights & Biases as a mirror of a run: never authoritative, and never a reason for a run to fail.

Whatever goes wrong in it is warned of once; the run goes on without it. An online run that cannot reach its server
becomes an offline one.

A training run has its parameters, the training log, W&B's own samples of the machine, rank pictures, and the adapter
by reference. Evaluation and registration come later and in other processes, and W&B cannot resume an offline run
(`resume` is ignored there, and two folders of one id cannot be synced). So what they find is a second run, of job
type `evaluate`, in one group with the training run and naming it in its configuration: the same offline and online.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from flows.params import Params
from flows.paths import Paths

log = logging.getLogger(__name__)

Mode = Literal["offline", "online", "disabled"]
LOGIN_SECONDS = 15
"""How long an online run waits for its server before it is tracked offline."""
EVALUATES = "evaluates"
"""Configuration key of an evaluation: the id of the training run that its figures are of."""

_SWEEP = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")


class Holder(Protocol):
    """What has a stage of the registry."""

    @property
    def version(self) -> str | None: ...


class Tracker:
    """One tracked run; with mode "disabled", or after a failure, every call does nothing."""

    def __init__(
        self,
        project: str,
        mode: Mode,
        config: Mapping[str, Any],
        directory: Path,
        evaluates: str | None = None,
        name: str | None = None,
    ) -> None:
        """Open a run of `project`, kept below `directory`/wandb; config: what to show beside its curves.

        evaluates: the id of the training run that this one is an evaluation of.
        name: what to call it; if left out, what DVC calls the experiment that it runs in.
        """
        self._run: Any = None
        if mode == "disabled":
            return
        told = {**config, EVALUATES: evaluates} if evaluates else config
        lasting = _lasting(directory)
        if "WANDB_SWEEP_ID" in os.environ:  # W&B puts a sweep's runs, and so we their evaluations, into its project
            project = os.environ.get("WANDB_PROJECT", project)
        modes: list[Mode] = [mode] if mode == "offline" else [mode, "offline"]
        for attempt in modes:
            outside = evaluates is not None or attempt != mode  # W&B takes the id of an attempt that failed as in use
            with _outside_of_a_sweep() if outside else nullcontext():
                identity = _identity(evaluates) | {"name": name or os.environ.get("DVC_EXP_NAME")}
                self._run = self._mirror(partial(_open, project, attempt, told, lasting, identity))
            if self._run is not None:
                return

    @property
    def run_id(self) -> str | None:
        """The run's id at Weights & Biases, or None if there is no run."""
        return None if self._run is None else self._run.id

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record of the training log."""
        values = {name: value for name, value in record.items() if value is not None and name != "step"}
        self._call(lambda run: run.log(values, step=record["step"]))

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Mirror a picture; pixels: (height, width, 3 or 4), uint8."""
        self._call(lambda run: run.log({name: _image(pixels)}, step=step))

    def table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Mirror rows that have the same keys, as a table."""
        every = list(rows)
        if every:
            self._call(lambda run: run.log({name: _table(every)}))

    def finish(self, summary: Mapping[str, Any], adapter: Path | None = None) -> None:
        """Close a run that succeeded; the adapter is recorded by reference to where it lies, not copied."""
        self._call(lambda run: run.summary.update(dict(summary)))
        if adapter is not None:
            self._call(lambda run: run.log_artifact(_reference(adapter)))
        self.close(exit_code=0)

    def close(self, exit_code: int = 1) -> None:
        """Close the run, if it is open still."""
        self._call(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _call(self, action: Callable[[Any], object]) -> None:
        if self._run is not None and self._mirror(lambda: (action(self._run), True)) is None:
            self._run = None

    def _mirror(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # wandb raises its own, the network's and the disk's errors
            log.warning("Weights & Biases: %s; the run goes on, its own log is complete", error)
            return None


def mirror_version(
    params: Params, paths: Paths, record: Mapping[str, Any], commit: str, stages: Mapping[str, Holder]
) -> None:
    """Mirror what was evaluated and registered, in one group with the training run; nothing if that was not tracked.

    record: the version's lineage. commit: what its tag points to. stages: who has which stage of the registry now,
    before the version itself is promoted.
    """
    trained = record["wandb_run_id"]
    if trained is None:
        return
    told, version = params.tracking, record["version"]
    tracker = Tracker(told.project, told.mode, record["params"], paths.root, trained, f"{record['name']} {version}")
    champion = stages.get(params.gate.stage)
    link = {
        "name": record["name"],
        "version": version,
        "tag": f"{record['name']}@{version}",
        "commit": commit,
        "champion_then": None if champion is None else champion.version,
    }
    try:
        slices = json.loads(paths.evaluation_metrics.read_text())["slices"]
        tracker.table("samples", json.loads(paths.samples.read_text()))
        tracker.table("slices", ({"slice": name, **figures} for name, figures in slices.items()))
        tracker.finish({**record["metrics"], "registry": link}, paths.adapter)
    except (OSError, ValueError, KeyError) as error:
        log.warning("Weights & Biases: what was evaluated is not mirrored: %s", error)
    finally:
        tracker.close()


@contextmanager
def _outside_of_a_sweep() -> Iterator[None]:
    """Hide the sweep that this process runs in: W&B would give the evaluation the training run's own id."""
    hidden = {name: os.environ.pop(name) for name in _SWEEP if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _lasting(directory: Path) -> Path:
    """The repository's folder for one below its .dvc/tmp/exps, which DVC removes after an experiment."""
    for parent in directory.resolve().parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return directory


def _identity(evaluates: str | None) -> dict[str, Any]:
    """id, group and job type of a run; a training run takes the id that a sweep's agent has given it."""
    own = uuid4().hex[:8]
    if evaluates is None:
        own = os.environ.get("WANDB_RUN_ID", own)
    group = os.environ.get("WANDB_RUN_GROUP") or evaluates or own
    return {"id": own, "group": group, "job_type": "train" if evaluates is None else "evaluate"}


def _open(project: str, mode: Mode, config: Mapping[str, Any], directory: Path, identity: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=LOGIN_SECONDS, login_timeout=LOGIN_SECONDS, disable_git=True
    )
    return wandb.init(
        project=project, mode=mode, config=dict(config), dir=str(directory), settings=settings, **dict(identity)
    )


def _image(pixels: Any) -> Any:
    import wandb

    return wandb.Image(pixels)


def _table(rows: list[Mapping[str, Any]]) -> Any:
    import wandb

    columns: list[int | str] = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[row.get(str(name)) for name in columns] for row in rows])


def _reference(adapter: Path) -> Any:
    import wandb

    artifact = wandb.Artifact("adapter", type="adapter")
    artifact.add_reference(f"file://{adapter.resolve()}")
    return artifact
