"""Runs at a W&B server, read through `wandb.Api`: those of a project, or one.

Which server and as whom is W&B's own matter: WANDB_BASE_URL, WANDB_API_KEY or `wandb login`.
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
"""That one question may wait for the server's answer."""
RUNS = 200
"""Of a project, the newest at most."""
STATES = {"finished": "finished", "failed": "failed", "crashed": "failed", "killed": "failed"}


def read(path: str) -> list[Run]:
    """The runs of ENTITY/PROJECT, the newest RUNS of them, or the one run of ENTITY/PROJECT/RUN_ID.

    Raises ReviewError if there is none, the server cannot be reached, or does not let us in.
    """
    parts = path.strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ReviewError(
            f"wandb:{path} is no run at a server; give wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/RUN_ID"
        )
    with _errors(path):
        import wandb

        api = wandb.Api(timeout=SECONDS)
        if len(parts) == 3:
            return [_run(api.run("/".join(parts)))]
        found = api.runs("/".join(parts), per_page=50, order="-created_at", lazy=False)
        runs = [_run(run) for run, _ in zip(found, range(RUNS), strict=False)]
    if not runs:
        raise ReviewError(f"wandb:{path} has no run yet")
    return runs


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """What W&B, the network or the disk raise, as one ReviewError."""
    try:
        yield
    except ReviewError:
        raise
    except Exception as error:  # of wandb's own there are several trees, and the network's and the disk's
        raise ReviewError(
            f"wandb:{path} cannot be read: {error}; look at the path, at WANDB_BASE_URL and at `wandb login --verify`"
        ) from error


def _run(run: Any) -> Run:
    """One run of W&B's API, with its whole history: a sample of it would leave out most validation losses."""
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
    """The server's time, which is UTC whether it says so or not."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _samples(run: Any, name: Any) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """The table of samples that a run has uploaded."""
    if not isinstance(name, str):
        return (), ()
    try:
        file = run.file(name)
        if file.size > TABLE_BYTES:
            return (), (f"its table of samples has more than {TABLE_BYTES} bytes and is not read",)
        with TemporaryDirectory(prefix="peftcore-") as folder, file.download(root=folder) as opened:
            table = json.loads(opened.read())
        return table_rows(table), ()
    except Exception as error:  # as above
        return (), (f"its table of samples cannot be read: {error}",)
