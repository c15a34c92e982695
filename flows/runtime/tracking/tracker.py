"""One tracked run, mirrored to each backend.

A training run has its parameters, the training log, rank pictures, and the adapter (W&B: by reference, and samples of
the machine). `flows.runtime.tracking.versions` mirrors the evaluation, the registration and the promotion.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from flows.runtime.tracking.folders import lasting_folder
from flows.runtime.tracking.mlflow_run import MlflowRun
from flows.runtime.tracking.tensorboard_run import TensorBoardRun
from flows.runtime.tracking.wandb_run import Mode, WandbRun

log = logging.getLogger(__name__)

Backend = Literal["wandb", "mlflow", "tensorboard"]
LABELS: Mapping[Backend, str] = {
    "wandb": WandbRun.label,
    "mlflow": MlflowRun.label,
    "tensorboard": TensorBoardRun.label,
}
NOTHING: Mapping[Backend, str] = MappingProxyType({})


class BackendRun(Protocol):
    """A run at one backend. Every method may raise any error of the backend, the network or the disk."""

    @property
    def id(self) -> str:
        """Id of the run at the backend."""
        ...

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record of the training log."""
        ...

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Mirror a picture; pixels: (height, width, 3 or 4), uint8."""
        ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Mirror rows with the same keys as a table."""
        ...

    def summarise(self, summary: Mapping[str, Any], adapter: Path | None) -> None:
        """Mirror the results and the adapter."""
        ...

    def close(self, failed: bool) -> None:
        """Close the run."""
        ...


class Tracker:
    """One tracked run; with mode "disabled" or without a working backend, calls do nothing.

    Args:
        project: The W&B project, or MLflow's experiment.
        mode: disabled: no backend is used; offline or online: the mode of W&B.
        config: Configuration to show beside the curves.
        directory: The repository; W&B's and TensorBoard's files, and by default MLflow's, are below it.
        evaluates: Id of the training run at W&B that this run evaluates.
        name: Name of the run; default: DVC's name of the experiment.
        backends: Names of the backends.
        mlflow_uri: Address of MLflow's server or database; None: MLFLOW_TRACKING_URI, or mlflow.db in `directory`.
        continued: {backend: id of its training run} that this run evaluates, for backends other than W&B.
    """

    def __init__(
        self,
        project: str,
        mode: Mode,
        config: Mapping[str, Any],
        directory: Path,
        evaluates: str | None = None,
        name: str | None = None,
        backends: Sequence[Backend] = ("wandb",),
        mlflow_uri: str | None = None,
        continued: Mapping[Backend, str] = NOTHING,
    ) -> None:
        self._runs: dict[Backend, BackendRun] = {}
        if mode == "disabled":
            return
        lasting = lasting_folder(directory)
        openers: dict[Backend, Callable[[], BackendRun]] = {
            "wandb": lambda: WandbRun(project, mode, config, lasting, evaluates, name),
            "mlflow": lambda: MlflowRun(mlflow_uri, project, config, lasting, continued.get("mlflow"), name),
            "tensorboard": lambda: TensorBoardRun(config, lasting, continued.get("tensorboard"), name),
        }
        for backend in backends:
            run = self._mirror(backend, openers[backend])
            if run is not None:
                self._runs[backend] = run

    @property
    def run_id(self) -> str | None:
        """Id of the run at Weights & Biases; None if there is no run."""
        return self.run_ids.get("wandb")

    @property
    def run_ids(self) -> dict[Backend, str]:
        """{backend: id of its run} of the backends that work."""
        return {backend: run.id for backend, run in self._runs.items()}

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record of the training log."""
        self._call(lambda run: run.log(record))

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Mirror a picture; pixels: (height, width, 3 or 4), uint8."""
        self._call(lambda run: run.picture(name, pixels, step))

    def table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Mirror rows with the same keys as a table."""
        every = list(rows)
        if every:
            self._call(lambda run: run.table(name, every))

    def register(self, record: Mapping[str, Any], commit: str, adapter: Path) -> None:
        """Make a version of MLflow's registered model; other backends have no registered models.

        Args:
            record: The version's record.
            commit: Commit of the version's tag.
            adapter: The adapter's folder.
        """
        run = self._runs.get("mlflow")
        if (
            isinstance(run, MlflowRun)
            and self._mirror("mlflow", lambda: (run.register(record, commit, adapter), 1)) is None
        ):
            del self._runs["mlflow"]

    def finish(self, summary: Mapping[str, Any], adapter: Path | None = None) -> None:
        """Close a successful run, with its results and its adapter."""
        self._call(lambda run: run.summarise(summary, adapter))
        self.close(failed=False)

    def close(self, failed: bool = True) -> None:
        """Close the run, if it is open."""
        self._call(lambda run: run.close(failed))
        self._runs = {}

    def _call(self, action: Callable[[BackendRun], object]) -> None:
        for backend, run in list(self._runs.items()):
            if self._mirror(backend, lambda run=run: (action(run), True)) is None:
                del self._runs[backend]

    def _mirror(self, backend: Backend, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # backends raise their own, the network's and the disk's errors
            log.warning("%s: %s; the run continues, and its own log is complete", LABELS[backend], error)
            return None
