"""Weights & Biases as a mirror of a run: never authoritative, and never a reason for a run to fail.

Whatever goes wrong in it is warned of once; the run goes on without it. An online run that cannot reach its server
becomes an offline one.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Mode = Literal["offline", "online", "disabled"]
LOGIN_SECONDS = 15
"""How long an online run waits for its server before it is tracked offline."""


class Tracker:
    """One tracked run; with mode "disabled", or after a failure, every call does nothing."""

    def __init__(self, project: str, mode: Mode, config: Mapping[str, Any], directory: Path) -> None:
        """Open a run of `project`, kept below `directory`/wandb; config: what to show beside its curves."""
        self._run: Any = None
        if mode == "disabled":
            return
        modes: list[Mode] = [mode] if mode == "offline" else [mode, "offline"]
        for attempt in modes:
            self._run = self._mirror(lambda attempt=attempt: _open(project, attempt, config, directory))
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


def _open(project: str, mode: Mode, config: Mapping[str, Any], directory: Path) -> Any:
    import wandb

    settings = wandb.Settings(silent=True, console="off", init_timeout=LOGIN_SECONDS, disable_git=True)
    return wandb.init(project=project, mode=mode, config=dict(config), dir=str(directory), settings=settings)


def _image(pixels: Any) -> Any:
    import wandb

    return wandb.Image(pixels)


def _reference(adapter: Path) -> Any:
    import wandb

    artifact = wandb.Artifact("adapter", type="adapter")
    artifact.add_reference(f"file://{adapter.resolve()}")
    return artifact
