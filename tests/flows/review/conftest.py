"""Runs that W&B itself has written: without a server, and killed half-way. Each once for the whole session."""

import signal
from pathlib import Path

import pytest
from tracked_runs import write_runs


@pytest.fixture(scope="session")
def offline_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three training runs and their evaluations."""
    folder = tmp_path_factory.mktemp("offline")
    assert write_runs(folder, "offline") == 0
    return folder / "wandb"


@pytest.fixture(scope="session")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a run that was killed while it logged."""
    folder = tmp_path_factory.mktemp("killed")
    assert write_runs(folder, "offline", "killed") == -signal.SIGKILL
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return log
