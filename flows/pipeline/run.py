"""The work of a run: bring every stage up to date, judge the version by the gate, write the review page.

Each stage is a subprocess `dvc repro --single-item STAGE`. So DVC decides which stages run, and a run does the same
work as `dvc repro`. If no stage has changed, no such subprocess and no Prefect server is started. Nothing here imports
torch, and Prefect is imported only where it runs stages.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flows.errors import BusyError, GateError, RepositoryError
from flows.evaluation.benchmarks import check_benchmarks
from flows.evaluation.scorers.load import check_scorers
from flows.gate.promote import Promotion, promote
from flows.gate.proposal import first_limits
from flows.params import left_over, load_params, load_suites
from flows.paths import Paths
from flows.registry.lineage import check_artifact_name
from flows.review.page import write_review
from flows.review.summary import print_summary
from flows.runtime.git import Git
from flows.runtime.last_run import RunRecord, recorded, running
from flows.runtime.locks import exclusive_if_free
from flows.runtime.project import changed_stages, stage_order
from flows.runtime.stage_code import refresh
from flows.runtime.stage_process import forked_stages, run_stage

logger = logging.getLogger(__name__)

Work = Callable[..., Any]
Changes = Callable[[], dict[str, list[str]]]
HOUR = 3600.0
CHECK = "check"
"""Name of the task that finds out whether a stage has changed."""
_NO_SERVER = ("Failed to reach API", "ephemeral Prefect API server")
"""Texts of Prefect's RuntimeErrors if its server cannot be reached or does not start."""


@dataclass(frozen=True)
class PipelineResult:
    """The result of a run. page: the review page; seconds: {task: wall clock}."""

    promotion: Promotion
    page: Path
    seconds: dict[str, float]


def run_pipeline(
    root: Path, stage_timeout: float = 6 * HOUR, push_to: str | None = None, changes: Changes | None = None
) -> PipelineResult:
    """Run the pipeline by Prefect; without Prefect's server, or if it goes away, do the same work without Prefect.

    Args:
        root: The repository.
        stage_timeout: Time limit for each stage (seconds).
        push_to: The git remote that decides between clones.
        changes: Gives what `changed_stages` returns or raises, if the caller has started it already.

    Raises:
        RepositoryError: The version could not be registered; raised before the first stage.
        RegistryError: Likewise, or the registry cannot be used.
        BusyError: Another run is at work in this folder.
        StageError: A stage failed.
        GateError: The gate refuses; raised after page and summary.
    """
    with _alone(root):  # ask before the server starts, too
        pass
    check_registrable(root)  # before Prefect's server starts, which takes about 15 seconds
    refresh(root)
    began = time.monotonic()
    if _is_unchanged(changes or partial(changed_stages, root)):
        print("no stage has changed", file=sys.stderr)
        with _alone(root), recorded(Paths(root)) as record:
            record.seconds[CHECK] = time.monotonic() - began
            return _judged(root, push_to, _directly, record)
    with forked_stages(root):  # it imports while Prefect's server starts
        return _by_prefect(root, stage_timeout, push_to)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Be the only run in a folder while the context is open; raise BusyError if there is another one."""
    with exclusive_if_free(root / ".dvc" / "tmp" / "run.lock") as free:
        if not free:
            other = running(Paths(root)) or {}
            who = f"process {other['pid']}, at {other['task']}" if other.get("alive") else "of another process"
            raise BusyError(f"a run ({who}) is at work in {root}; wait for it, or stop it")
        yield


def _is_unchanged(changes: Changes) -> bool:
    """Return True if every stage is up to date."""
    try:
        return not changes()
    except RepositoryError as error:
        logger.debug("%s", error)  # the run of the stages meets the same error, and reports it
        return False


def _by_prefect(root: Path, stage_timeout: float, push_to: str | None) -> PipelineResult:
    import httpx

    from flows.pipeline.flow import pipeline
    from flows.runtime.prefect_server import tie_temporary_server

    try:
        tie_temporary_server()
        return pipeline(root, stage_timeout, push_to)
    except (RuntimeError, httpx.TransportError) as error:
        if not is_without_server(error):
            raise
        logger.warning("Prefect's server cannot be reached (%s); continuing without it", error)
    return run_stages(root, stage_timeout, push_to, _directly)


def check_registrable(root: Path) -> None:
    """Check the requirements of the evaluate and register stages, which come last, before the training.

    Raises:
        RepositoryError: There is no git repository with a commit.
        RegistryError: dvc.yaml declares no adapter of the project's name.
        ParamsError: params.yaml or a file of evaluate.suites cannot be used.
        StageError: A scorer or a reward, a file that a suite names, or the file of a benchmark is missing.
        MissingExtraError: lm-evaluation-harness is not installed.
    """
    Git(root)
    params = load_params(Paths(root).params)
    check_artifact_name(root, params.project.name)
    check_scorers(params.scorers, root)
    load_suites(params.evaluate, params.data.system_prompt, root)
    check_benchmarks(params.evaluate.benchmarks, root)


def run_stages(
    root: Path, stage_timeout: float, push_to: str | None, in_task: Callable[[str, Work], Work]
) -> PipelineResult:
    """Bring every stage up to date, judge the version, write the page, print a summary.

    Args:
        root: The repository.
        stage_timeout: Time limit for each stage (seconds).
        push_to: The git remote that decides between clones.
        in_task: Gives a task's work by its name and its function.

    Raises:
        BusyError: Another run is at work in this folder.
        StageError: A stage failed.
        GateError: The gate refuses; raised after page and summary.
    """
    with _alone(root), recorded(Paths(root)) as record:
        check_registrable(root)
        stages = stage_order(root)
        for done, stage in enumerate(stages):
            with record.at(stage):
                in_task(stage, run_stage)(root, stage, stage_timeout, False, f"{done}/{len(stages)}")
        return _judged(root, push_to, in_task, record)


def _judged(root: Path, push_to: str | None, in_task: Callable[[str, Work], Work], record: RunRecord) -> PipelineResult:
    """Judge the version of stages that are up to date, write the page, print a summary; see `run_stages`."""
    paths = Paths(root)
    params = load_params(paths.params)
    for warning in left_over(params):
        logger.warning("%s", warning)
    with record.at("promote"):
        promotion: Promotion = in_task("promote", promote)(params, paths, None, False, push_to)
    record.promotion = promotion.as_dict()
    with record.at("review"):
        page: Path = in_task("review", write_review)(params, paths)
    record.page = str(page)
    print_summary(paths, promotion, page, record.seconds, first_limits(params, paths, promotion))
    if not promotion.accepted:
        raise GateError(promotion.sentence)
    return PipelineResult(promotion, page, record.seconds)


def _directly(_name: str, work: Work) -> Work:
    return work


def is_without_server(error: Exception) -> bool:
    """Return True if an error says that Prefect cannot reach or start its server."""
    import httpx

    return isinstance(error, httpx.TransportError) or any(sign in str(error) for sign in _NO_SERVER)
