"""A run of the pipeline: by Prefect, or without it if nothing has changed or its server cannot be reached.

If no stage has changed, neither a subprocess of a stage nor Prefect's server is started. Nothing here imports torch,
and Prefect is imported only where it runs stages.
"""

import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flows.errors import RepositoryError
from flows.paths import Paths
from flows.pipeline.work import HOUR, PipelineResult, Work, alone, check_registrable, judged, run_stages
from flows.runtime.last_run import recorded
from flows.runtime.project import changed_stages
from flows.runtime.stage_code import refresh
from flows.runtime.stage_process import forked_stages

logger = logging.getLogger(__name__)

Changes = Callable[[], dict[str, list[str]]]
CHECK = "check"
"""Name of the task that finds out whether a stage has changed."""
_NO_SERVER = ("Failed to reach API", "ephemeral Prefect API server")
"""Texts of Prefect's RuntimeErrors if its server cannot be reached or does not start."""


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
    with alone(root):  # ask before the server starts, too
        pass
    check_registrable(root)  # before Prefect's server starts, which takes about 15 seconds
    refresh(root)
    began = time.monotonic()
    if _is_unchanged(changes or partial(changed_stages, root)):
        print("no stage has changed", file=sys.stderr)
        with alone(root), recorded(Paths(root)) as record:
            record.seconds[CHECK] = time.monotonic() - began
            return judged(root, push_to, _directly, record)
    with forked_stages(root):  # it imports while Prefect's server starts
        return _by_prefect(root, stage_timeout, push_to)


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
    from flows.runtime.prefect_server import tied_temporary_server

    try:
        with tied_temporary_server():
            return pipeline(root, stage_timeout, push_to)
    except (RuntimeError, httpx.TransportError) as error:
        if not is_without_server(error):
            raise
        logger.warning("Prefect's server cannot be reached (%s); continuing without it", error)
    return run_stages(root, stage_timeout, push_to, _directly)


def _directly(_name: str, work: Work) -> Work:
    return work


def is_without_server(error: Exception) -> bool:
    """Return True if an error says that Prefect cannot reach or start its server."""
    import httpx

    return isinstance(error, httpx.TransportError) or any(sign in str(error) for sign in _NO_SERVER)
