"""Runs at a W&B server, read through `wandb.Api`: a project's runs, or one run.

The server and the account are W&B's own settings: WANDB_BASE_URL, WANDB_API_KEY or `wandb login`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from typing import Any

from flows.errors import ReviewError
from flows.review.offline import TABLE_BYTES, table_rows
from flows.review.run import Run, Sample, flat, series

SECONDS = 30
"""Time limit of one request to the server."""
RUNS = 200
"""Largest number of newest runs of a project."""
STATES = {"finished": "finished", "failed": "failed", "crashed": "failed", "killed": "failed"}


def read(path: str) -> list[Run]:
    """Return the newest RUNS runs of ENTITY/PROJECT, or the run ENTITY/PROJECT/RUN_ID.

    Raises:
        ReviewError: there is no run, or the server cannot be reached or denies access.
    """
    parts = path.strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ReviewError(f"wandb:{path} does not name a run; give wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/RUN_ID")
    with _errors(path):
        import wandb

        api = wandb.Api(timeout=SECONDS)
        if len(parts) == 3:
            return [_run(api.run("/".join(parts)))]
        newest = api.runs("/".join(parts), per_page=50, order="-created_at", lazy=False)
        runs = [_run(run) for run, _ in zip(newest, range(RUNS), strict=False)]
    if not runs:
        raise ReviewError(f"wandb:{path} has no run yet; `wandb sync FOLDER` uploads offline runs")
    return runs


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """Turn errors of W&B, the network and the disk into a ReviewError."""
    try:
        yield
    except ReviewError:
        raise
    except Exception as error:  # wandb has several trees of errors, and passes on those of the network and the disk
        raise ReviewError(
            f"wandb:{path} cannot be read: {error}; check the path, WANDB_BASE_URL and `wandb login --verify`"
        ) from error


def _run(run: Any) -> Run:
    """Read one run with its whole history, because a sampled history lacks most validation losses."""
    summary = flat({key: value for key, value in dict(run.summary_metrics).items() if not key.startswith("_")})
    samples, warnings = _samples(run, summary.get("samples.path"))
    version = summary.get("registry.version")
    return Run(
        id=run.id,
        name=run.name or run.id,
        where=f"wandb:{run.entity}/{run.project}/{run.id}",
        started=_moment(run.created_at),
        state=STATES.get(run.state, "unfinished"),
        config=flat(run.config),
        summary={key: value for key, value in summary.items() if not key.startswith(("samples.", "slices."))},
        history=series(run.scan_history(), "_step"),
        samples=samples,
        version=version if isinstance(version, str) else None,
        warnings=warnings,
    )


def _moment(text: str) -> datetime:
    """Return the server's time, which is UTC even without a time zone."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _samples(run: Any, name: Any) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Return a run's uploaded table of samples, and warnings."""
    if not isinstance(name, str):
        return (), ()
    try:
        file = run.file(name)
        if file.size > TABLE_BYTES:
            return (), (f"its table of samples has more than {TABLE_BYTES} bytes and is not read",)
        with TemporaryDirectory(prefix="peftcore-") as folder, file.download(root=folder) as opened:
            table = json.loads(opened.read())
        return table_rows(table), ()
    except Exception as error:  # see `_errors`
        return (), (f"its table of samples cannot be read: {error}",)
