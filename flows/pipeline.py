"""The Prefect flow of a run: one task for each stage of dvc.yaml, then the gate and the review page.

Each stage is a subprocess `dvc repro --single-item STAGE`. So DVC decides which stages run, and the flow does the same
work as `dvc repro`. Nothing here imports torch.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect import Task, flow
from prefect.cache_policies import NO_CACHE

from flows.errors import GateError
from flows.gate.promote import Promotion, promote
from flows.params import left_over, load_params
from flows.paths import Paths
from flows.registry.lineage import check_artifact_name
from flows.review.page import write_review
from flows.review.summary import print_summary
from flows.runtime.git import Git
from flows.runtime.last_run import RunRecord, recorded
from flows.runtime.prefect_server import tie_temporary_server
from flows.runtime.project import stage_order
from flows.runtime.stage_process import run_stage

logger = logging.getLogger(__name__)

Work = Callable[..., Any]
HOUR = 3600.0
_NO_SERVER = ("Failed to reach API", "ephemeral Prefect API server")
"""Texts of Prefect's RuntimeErrors if its server cannot be reached or does not start."""


@dataclass(frozen=True)
class PipelineResult:
    """The result of a run. page: the review page; seconds: {task: wall clock}."""

    promotion: Promotion
    page: Path
    seconds: dict[str, float]


def run_pipeline(root: Path, stage_timeout: float = 6 * HOUR, push_to: str | None = None) -> PipelineResult:
    """Run `pipeline`; without Prefect's server, or if it goes away, do the same work without Prefect."""
    check_registrable(root)  # before Prefect's server starts, which takes about 15 seconds
    try:
        tie_temporary_server()
        return pipeline(root, stage_timeout, push_to)
    except (RuntimeError, httpx.TransportError) as error:
        if not is_without_server(error):
            raise
        logger.warning("Prefect's server cannot be reached (%s); continuing without it", error)
    return _work(root, stage_timeout, push_to, in_task=lambda _, work: work)


def check_registrable(root: Path) -> None:
    """Check the requirements of the register stage, which comes last, before the training.

    Raises:
        RepositoryError: there is no git repository with a commit.
        RegistryError: dvc.yaml declares no adapter of the project's name.
        ParamsError: params.yaml cannot be used.
    """
    Git(root)
    check_artifact_name(root, load_params(Paths(root).params).project.name)


@flow(name="pipeline", validate_parameters=False)
def pipeline(root: Path, stage_timeout: float = 6 * HOUR, push_to: str | None = None) -> PipelineResult:
    """Bring every stage up to date, judge the version by the gate, write the review page, print a summary.

    Args:
        root: the repository.
        stage_timeout: time limit for each stage, in seconds.
        push_to: the git remote that decides between clones.

    Raises:
        RepositoryError: the version could not be registered; raised before the first stage.
        RegistryError: likewise, or the registry cannot be used.
        StageError: a stage failed.
        GateError: the gate refuses; raised after page and summary.
    """
    # a deployment gives an empty text if its variable is not set
    return _work(Path(root).resolve(), stage_timeout, push_to or None, in_task=_task)


def _task(name: str, work: Work) -> Work:
    """Return `work` as a Prefect task without Prefect's cache, because DVC decides which stages run."""
    return Task(work, name=name, task_run_name=name, cache_policy=NO_CACHE)


def _work(
    root: Path, stage_timeout: float, push_to: str | None, in_task: Callable[[str, Work], Work]
) -> PipelineResult:
    with recorded(Paths(root)) as record:
        return _tasks(root, stage_timeout, push_to, in_task, record)


def _tasks(
    root: Path, stage_timeout: float, push_to: str | None, in_task: Callable[[str, Work], Work], record: RunRecord
) -> PipelineResult:
    paths = Paths(root)
    params = load_params(paths.params)
    for warning in left_over(params):
        logger.warning("%s", warning)
    check_registrable(root)

    def run(name: str, work: Work, *arguments: Any) -> Any:
        with record.at(name):
            return in_task(name, work)(*arguments)

    stages = stage_order(root)
    for done, stage in enumerate(stages):
        run(stage, run_stage, root, stage, stage_timeout, False, f"{done}/{len(stages)}")
    promotion = run("promote", promote, params, paths, None, False, push_to)
    record.promotion = promotion.as_dict()
    page = run("review", write_review, params, paths)
    record.page = str(page)
    print_summary(paths, promotion, page, record.seconds)
    if not promotion.accepted:
        raise GateError(promotion.sentence)
    return PipelineResult(promotion, page, record.seconds)


def is_without_server(error: Exception) -> bool:
    """Return True if an error says that Prefect cannot reach or start its server."""
    return isinstance(error, httpx.TransportError) or any(sign in str(error) for sign in _NO_SERVER)
