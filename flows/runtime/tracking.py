"""Mirroring of a run to Weights & Biases. The run reads nothing back, and an error of W&B never fails the run.

A failure gives one warning, and the run continues without tracking. An online run that cannot reach its server becomes
an offline run.

A training run has its parameters, the training log, W&B's samples of the machine, rank pictures, and the adapter by
reference. Evaluation and registration run later and in other processes, and W&B cannot resume an offline run (`resume`
is ignored there, and two folders of one id cannot be synced). Their results are therefore a second run of job type
`evaluate`, in one group with the training run and with its id in the configuration, both offline and online.
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
"""Seconds that an online run waits for its server before it is tracked offline."""
EVALUATES = "evaluates"
"""Configuration key of an evaluation: id of the evaluated training run."""

_SWEEP = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")


class Holder(Protocol):
    """Holder of a stage of the registry."""

    @property
    def version(self) -> str | None:
        """Number of the holding version."""
        ...


class Tracker:
    """One tracked run, kept below `directory`/wandb; with mode "disabled" or after a failure, calls do nothing.

    Args:
        project: The W&B project.
        mode: offline, online or disabled.
        config: Configuration to show beside the curves.
        directory: Folder of the run's files.
        evaluates: Id of the training run that this run evaluates.
        name: Name of the run; default: DVC's name of the experiment.
    """

    def __init__(
        self,
        project: str,
        mode: Mode,
        config: Mapping[str, Any],
        directory: Path,
        evaluates: str | None = None,
        name: str | None = None,
    ) -> None:
        self._run: Any = None
        if mode == "disabled":
            return
        shown = {**config, EVALUATES: evaluates} if evaluates else config
        lasting = _lasting(directory)
        if "WANDB_SWEEP_ID" in os.environ:  # a sweep's project, also for evaluations
            project = os.environ.get("WANDB_PROJECT", project)
        modes: list[Mode] = [mode] if mode == "offline" else [mode, "offline"]
        for attempt in modes:
            outside = evaluates is not None or attempt != mode  # for W&B the id of a failed attempt is in use
            with _outside_of_a_sweep() if outside else nullcontext():
                identity = _identity(evaluates) | {"name": name or os.environ.get("DVC_EXP_NAME")}
                self._run = self._mirror(partial(_open, project, attempt, shown, lasting, identity))
            if self._run is not None:
                return

    @property
    def run_id(self) -> str | None:
        """Id of the run at Weights & Biases; None if there is no run."""
        return None if self._run is None else self._run.id

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record of the training log."""
        values = {name: value for name, value in record.items() if value is not None and name != "step"}
        self._call(lambda run: run.log(values, step=record["step"]))

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Mirror a picture; pixels: (height, width, 3 or 4), uint8."""
        self._call(lambda run: run.log({name: _image(pixels)}, step=step))

    def table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Mirror rows with the same keys as a table."""
        every = list(rows)
        if every:
            self._call(lambda run: run.log({name: _table(every)}))

    def finish(self, summary: Mapping[str, Any], adapter: Path | None = None) -> None:
        """Close a successful run; the adapter is recorded by reference, not copied."""
        self._call(lambda run: run.summary.update(dict(summary)))
        if adapter is not None:
            self._call(lambda run: run.log_artifact(_reference(adapter)))
        self.close(exit_code=0)

    def close(self, exit_code: int = 1) -> None:
        """Close the run, if it is open."""
        self._call(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _call(self, action: Callable[[Any], object]) -> None:
        if self._run is not None and self._mirror(lambda: (action(self._run), True)) is None:
            self._run = None

    def _mirror(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # wandb raises its own, the network's and the disk's errors
            log.warning("Weights & Biases: %s; the run continues, and its own log is complete", error)
            return None


def mirror_version(
    params: Params, paths: Paths, record: Mapping[str, Any], commit: str, stages: Mapping[str, Holder]
) -> None:
    """Mirror evaluation and registration in one group with the training run, if that was tracked.

    Args:
        params: The parameters of the run.
        paths: The project's files.
        record: The version's record.
        commit: Commit of the version's tag.
        stages: Holders of the registry's stages before the version's promotion.
    """
    trained = record["wandb_run_id"]
    if trained is None:
        return
    tracking, version = params.tracking, record["version"]
    tracker = Tracker(
        tracking.project, tracking.mode, record["params"], paths.root, trained, f"{record['name']} {version}"
    )
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
        if paths.evaluation_suites.exists():
            tracker.table("suites", _suite_rows(json.loads(paths.evaluation_suites.read_text())))
        tracker.table("slices", ({"slice": name, **figures} for name, figures in slices.items()))
        tracker.finish({**record["metrics"], "registry": link}, paths.adapter)
    except (OSError, ValueError, KeyError) as error:
        log.warning("Weights & Biases: the evaluation is not mirrored: %s", error)
    finally:
        tracker.close()


def _suite_rows(suites: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one row per answer to a prompt suite; the column `failed` is empty if the answer passes."""
    for name, suite in suites.items():
        for prompt in suite["prompts"]:
            for answer in prompt["answers"]:
                shown = {
                    "suite": name,
                    "id": prompt["id"],
                    "prompt": prompt["prompt"],
                    "must": "; ".join(prompt["must"]),
                }
                failed = "; ".join(answer["failed"].values())
                yield shown | {"seed": answer["seed"], "answer": answer["text"], "failed": failed}


@contextmanager
def _outside_of_a_sweep() -> Iterator[None]:
    """Hide a sweep's variables: W&B would give the evaluation the id of the training run."""
    hidden = {name: os.environ.pop(name) for name in _SWEEP if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _lasting(directory: Path) -> Path:
    """Return the repository's folder for a folder below .dvc/tmp/exps, which DVC deletes after an experiment."""
    for parent in directory.resolve().parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return directory


def _identity(evaluates: str | None) -> dict[str, Any]:
    """Return id, group and job type of a run; a training run uses the id from a sweep's agent."""
    run_id = uuid4().hex[:8]
    if evaluates is None:
        run_id = os.environ.get("WANDB_RUN_ID", run_id)
    group = os.environ.get("WANDB_RUN_GROUP") or evaluates or run_id
    return {"id": run_id, "group": group, "job_type": "train" if evaluates is None else "evaluate"}


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
