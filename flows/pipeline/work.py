"""The work of a run: bring every stage up to date, judge the version by the gate, write the review page.

Each stage is a subprocess `dvc repro --single-item STAGE`. So DVC decides which stages run, and a run does the same
work as `dvc repro`. Nothing here imports torch or Prefect.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.errors import BusyError, GateError
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
from flows.runtime.project import stage_order
from flows.runtime.stage_process import run_stage

logger = logging.getLogger(__name__)

Work = Callable[..., Any]
HOUR = 3600.0


@dataclass(frozen=True)
class PipelineResult:
    """The result of a run. page: the review page; seconds: {task: wall clock}."""

    promotion: Promotion
    page: Path
    seconds: dict[str, float]


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Be the only run in a folder while the context is open; raise BusyError if there is another one."""
    with exclusive_if_free(root / ".dvc" / "tmp" / "run.lock") as free:
        if not free:
            other = running(Paths(root)) or {}
            who = f"process {other['pid']}, at {other['task']}" if other.get("alive") else "of another process"
            raise BusyError(f"a run ({who}) is at work in {root}; wait for it, or stop it")
        yield


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
    with alone(root), recorded(Paths(root)) as record:
        check_registrable(root)
        stages = stage_order(root)
        for done, stage in enumerate(stages):
            with record.at(stage):
                in_task(stage, run_stage)(root, stage, stage_timeout, False, f"{done}/{len(stages)}")
        return judged(root, push_to, in_task, record)


def judged(root: Path, push_to: str | None, in_task: Callable[[str, Work], Work], record: RunRecord) -> PipelineResult:
    """Judge the version of stages that are up to date, write the page, print a summary.

    Args:
        root: The repository.
        push_to: The git remote that decides between clones.
        in_task: Gives a task's work by its name and its function.
        record: Gets the seconds of the tasks, the judgement and the page.

    Raises:
        GateError: The gate refuses; raised after page and summary.
    """
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
