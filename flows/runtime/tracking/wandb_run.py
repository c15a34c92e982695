"""A run at Weights & Biases.

An online run that cannot reach its server becomes an offline run. Evaluation and registration run later and in other
processes, and W&B cannot resume an offline run (`resume` is ignored there, and two folders of one id cannot be synced).
Their results are therefore a second run of job type `evaluate`, in one group with the training run and with its id in
the configuration, both offline and online.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

log = logging.getLogger(__name__)

Mode = Literal["offline", "online", "disabled"]
LOGIN_SECONDS = 15
"""Seconds that an online run waits for its server before it is tracked offline."""
EVALUATES = "evaluates"
"""Configuration key of an evaluation: id of the evaluated training run."""
JobType = Literal["train", "evaluate", "promote"]

_SWEEP = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")


class WandbRun:
    """One run, kept below `directory`/wandb.

    Args:
        project: The W&B project.
        mode: offline or online.
        config: Configuration to show beside the curves.
        directory: Folder of the run's files.
        evaluates: Id of the training run that this run evaluates or promotes.
        name: Name of the run; default: DVC's name of the experiment.
        job_type: The kind of run; default: train, or evaluate if `evaluates` is given.

    Raises:
        Exception: W&B's, the network's or the disk's error, if the run cannot be opened offline either.
    """

    label = "Weights & Biases"

    def __init__(
        self,
        project: str,
        mode: Mode,
        config: Mapping[str, Any],
        directory: Path,
        evaluates: str | None = None,
        name: str | None = None,
        job_type: JobType | None = None,
    ) -> None:
        shown = {**config, EVALUATES: evaluates} if evaluates else config
        if "WANDB_SWEEP_ID" in os.environ:  # a sweep's project, also for evaluations
            project = os.environ.get("WANDB_PROJECT", project)
        outside = _outside_of_a_sweep if evaluates is not None else nullcontext
        identity = _identity(evaluates, job_type)
        try:
            with outside():
                self._run = _open(project, mode, shown, directory, _named(identity, name))
        except Exception as error:  # wandb raises its own, the network's and the disk's errors
            if mode == "offline":
                raise
            log.warning("%s: %s; the run continues, and its own log is complete", self.label, error)
            with _outside_of_a_sweep():  # for W&B the id of a failed attempt is in use
                self._run = _open(project, "offline", shown, directory, _named(_identity(evaluates, job_type), name))

    @property
    def id(self) -> str:
        """Id of the run."""
        return self._run.id

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record of the training log."""
        values = {name: value for name, value in record.items() if value is not None and name != "step"}
        self._run.log(values, step=record["step"])

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Mirror a picture; pixels: (height, width, 3 or 4), uint8."""
        import wandb

        self._run.log({name: wandb.Image(pixels)}, step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Mirror rows with the same keys as a table."""
        import wandb

        columns: list[int | str] = list(dict.fromkeys(name for row in rows for name in row))
        data: Any = [[row.get(str(name)) for name in columns] for row in rows]
        self._run.log({name: wandb.Table(columns=columns, data=data)})

    def summarise(self, summary: Mapping[str, Any], adapter: Path | None) -> None:
        """Mirror the results; the adapter is recorded by reference, not copied."""
        import wandb

        self._run.summary.update(dict(summary))
        if adapter is not None:
            artifact = wandb.Artifact("adapter", type="adapter")
            artifact.add_reference(f"file://{adapter.resolve()}")
            self._run.log_artifact(artifact)

    def link(
        self, registry: str, name: str, adapter: Path, metadata: Mapping[str, Any], aliases: Sequence[str]
    ) -> None:
        """Upload an adapter, and link it into the collection `name` of a registry; needs a server.

        Args:
            registry: Name of the W&B registry, such as model.
            name: Name of the collection.
            adapter: The adapter's folder.
            metadata: What identifies the version.
            aliases: Aliases of the linked version, such as champion.
        """
        import wandb

        artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
        artifact.add_dir(str(adapter))
        self._run.link_artifact(artifact, target_path=f"wandb-registry-{registry}/{name}", aliases=list(aliases))

    def close(self, failed: bool) -> None:
        """Close the run."""
        self._run.finish(exit_code=int(failed))


@contextmanager
def _outside_of_a_sweep() -> Iterator[None]:
    """Hide a sweep's variables: W&B would give the evaluation the id of the training run."""
    hidden = {name: os.environ.pop(name) for name in _SWEEP if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _identity(evaluates: str | None, job_type: JobType | None) -> dict[str, Any]:
    """Return id, group and job type of a run; a training run uses the id from a sweep's agent."""
    run_id = uuid4().hex[:8]
    if evaluates is None:
        run_id = os.environ.get("WANDB_RUN_ID", run_id)
    group = os.environ.get("WANDB_RUN_GROUP") or evaluates or run_id
    return {"id": run_id, "group": group, "job_type": job_type or ("train" if evaluates is None else "evaluate")}


def _named(identity: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    return {**identity, "name": name or os.environ.get("DVC_EXP_NAME")}


def _open(project: str, mode: Mode, config: Mapping[str, Any], directory: Path, identity: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=LOGIN_SECONDS, login_timeout=LOGIN_SECONDS, disable_git=True
    )
    return wandb.init(
        project=project, mode=mode, config=dict(config), dir=str(directory), settings=settings, **dict(identity)
    )
