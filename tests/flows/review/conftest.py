"""Runs that W&B itself has written, without a server and killed half-way, each once a session; and a comparison."""

import signal
from pathlib import Path

import pytest
from compared_runs import run
from tracked_runs import write_runs

from flows.review.comparison import Comparison, compare


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


@pytest.fixture
def comparison() -> Comparison:
    """Three runs: `better`, the champion; `worse`, of another rank; `unknown`, which was killed before its test."""
    sample = {"prompt": "p", "reference": "r", "base": "b", "adapter": "good"}
    return compare(
        [
            run("worse", 2.9, config={"method.r": 4}, samples=({**sample, "adapter": "bad"},)),
            run("unknown", None, state="unfinished", warnings=("it was killed",)),
            run("better", 2.5, samples=(sample, {**sample, "prompt": "q"}), is_champion=True, version="v0.1.2"),
        ]
    )
