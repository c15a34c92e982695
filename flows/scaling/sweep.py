"""The Prefect flow of a sweep: one task for each set of parameters, mapped over threads, processes or a Ray cluster."""

import os
from pathlib import Path
from typing import Any

from prefect import Task, flow, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.errors import StageError
from flows.gate.holdout_reuse import note_trial
from flows.params import check_overrides, load_params, parameter_sets, source_names
from flows.paths import Paths
from flows.runtime.git import Git
from flows.runtime.inputs import check_source_is_tracked
from flows.runtime.prefect_server import tied_temporary_server
from flows.scaling.ranking import ranked, write_ranking
from flows.scaling.trial import SweepSettings, Trial, run_trial, snapshot


def run_sweep(
    root: Path, overrides: list[str], runner: str, jobs: int, stage_timeout: float, limit: str | None = None
) -> list[Trial]:
    """Run a trial for every combination of `overrides`.

    Code and parameters are those of the working tree's tracked files. The report is reports/sweep.json and sweep.md.
    The number of trials is counted for later versions on the same data.

    Args:
        root: the repository.
        overrides: values of parameters, such as train.learning_rate=1e-4,5e-4.
        runner: "thread", "process" or "ray".
        jobs: number of trials at a time.
        stage_timeout: time limit for each stage, in seconds.
        limit: a concurrency limit of Prefect; each trial occupies one slot.

    Returns:
        The trials, best validation loss first, failed trials last.

    Raises:
        ParamsError: a combination is invalid.
        DataError: neither git nor DVC has the data.
        StageError: Ray is not installed.
    """
    sets = parameter_sets(overrides)
    check_overrides(Paths(root).params, *sets)
    for source in source_names(load_params(Paths(root).params).data.model_dump()):
        check_source_is_tracked(Git(root), source, "a sweep, which works in copies of git's files,")
    settings = SweepSettings(root, snapshot(root), stage_timeout, limit)
    with tied_temporary_server():
        trials = ranked(sweep.with_options(task_runner=_RUNNERS[runner](jobs))(settings, sets))
    write_ranking(Paths(root), trials)
    return trials


@flow(name="sweep", validate_parameters=False)
def sweep(settings: SweepSettings, sets: list[tuple[str, ...]]) -> list[Trial]:
    """Run one trial for each set of parameters; the results are in the order of `sets`."""
    trial = Task(_noted_trial, name="trial", task_run_name="{overrides}", cache_policy=NO_CACHE)
    return trial.map(unmapped(settings), sets).result()


def _noted_trial(settings: SweepSettings, overrides: tuple[str, ...]) -> Trial:
    """Run a trial and count it at once, so that a sweep that is killed later has counted its trials."""
    trial = run_trial(settings, overrides)
    if trial.lock is not None and trial.params is not None:
        note_trial(Paths(settings.root), trial.lock, trial.params)
    return trial


def _threads(jobs: int) -> TaskRunner[Any]:
    return ThreadPoolTaskRunner(max_workers=jobs)


def _processes(jobs: int) -> TaskRunner[Any]:
    return ProcessPoolTaskRunner(max_workers=jobs)


def _ray(jobs: int) -> TaskRunner[Any]:
    """Use the cluster of RAY_ADDRESS, whose size then limits the trials at a time; else Ray on this machine."""
    try:
        from prefect_ray import RayTaskRunner  # pyright: ignore[reportMissingImports]  # an extra: it may be absent
    except ImportError as error:
        raise StageError(
            f"sweeps on Ray need prefect-ray ({error}); `pip install 'peftcore[scale]'`, or give --runner thread"
        ) from error
    if os.environ.get("RAY_ADDRESS"):
        return RayTaskRunner()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return RayTaskRunner(
        init_kwargs={
            "num_cpus": jobs,
            "_node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "log_to_driver": True,
        }
    )


_RUNNERS = {"thread": _threads, "process": _processes, "ray": _ray}
