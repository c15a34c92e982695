"""A run of the pipeline as a Prefect flow: one task for each stage of dvc.yaml, then the gate and the review page."""

from pathlib import Path
from typing import Any

from prefect import Task, flow
from prefect.cache_policies import NO_CACHE

from flows.pipeline.work import HOUR, PipelineResult, run_stages


@flow(name="pipeline", validate_parameters=False)
def pipeline(root: Path, stage_timeout: float = 6 * HOUR, push_to: str | None = None) -> PipelineResult:
    """Bring every stage up to date, judge the version by the gate, write the review page, print a summary.

    Args:
        root: the repository.
        stage_timeout: time limit for each stage, in seconds.
        push_to: the git remote whose tags are authoritative for all clones.

    Raises:
        RepositoryError: the version could not be registered; raised before the first stage.
        RegistryError: likewise, or the registry cannot be used.
        StageError: a stage failed.
        GateError: the gate refuses; raised after page and summary.
    """
    # a deployment gives an empty text if its variable is not set
    return run_stages(Path(root).resolve(), stage_timeout, push_to or None, in_task=_task)


def _task(name: str, work: Any) -> Any:
    """Return `work` as a Prefect task without Prefect's cache, because DVC decides which stages run."""
    return Task(work, name=name, task_run_name=name, cache_policy=NO_CACHE)
