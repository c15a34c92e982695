"""Scheduled retraining on a machine without a Prefect server: this process starts one for its own lifetime.

Prefect's temporary server cannot schedule, so a full server is started, on the loopback address only, with its database
in .prefect. If PREFECT_API_URL names a server, that server is used.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx

from flows.errors import ParamsError, RepositoryError, StageError
from flows.paths import Paths
from flows.retraining.committed import last_readable_params
from flows.runtime.cron import next_time
from flows.runtime.git import Git
from flows.runtime.processes import die_with_parent, this_host
from flows.webhooks import Event, try_to_announce, try_to_deliver
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_DELIVERIES = 30.0
"""Seconds between two looks for webhooks that are due."""
SECONDS_TO_START = 180.0
"""Time limit for the server's start; the first start migrates the database."""


def serve(paths: Paths, cron: str, timezone: str, push_to: str | None) -> None:
    """Retrain at the times of `cron`, one retraining at a time, until SIGTERM or Ctrl-C.

    While this runs, `paths.schedule` holds the schedule.

    Args:
        paths: the repository.
        cron: five fields, as in '0 3 * * 1'.
        timezone: time zone of cron's hours, such as Europe/Berlin.
        push_to: the git remote whose tags are authoritative for all clones.

    Raises:
        ParamsError: the cron expression or the time zone is invalid.
        StageError: the server did not start.
    """
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        when = CronSchedule(cron=cron, timezone=timezone)
        next_time(cron, timezone, datetime.now(UTC))  # Prefect also takes expressions such as @daily
    except ValueError as error:
        faults = error.errors() if isinstance(error, ValidationError) else [{"msg": str(error)}]
        reason = "; ".join(one["msg"].removeprefix("Value error, ") for one in faults)
        raise ParamsError(
            f"--cron {cron!r} in --timezone {timezone!r}: {reason}; give five fields such as '0 3 * * 1' "
            "and a zone such as Europe/Berlin"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=_deliver_webhooks, args=(paths,), daemon=True).start()
    with _announced_failure(paths), _server(paths) as url:
        os.environ["PREFECT_API_URL"] = url
        from flows.retraining.flow import retrain

        note = {"cron": cron, "timezone": timezone, "pid": os.getpid(), "host": this_host(), "server": url}
        write_atomically(paths.schedule, json.dumps(note) + "\n")
        try:
            options: dict[str, Any] = {"root": str(paths.root), "push_to": push_to}
            retrain.serve(
                name="scheduled", schedules=[when], parameters=options, limit=1, pause_on_shutdown=False,
                print_starting_message=sys.stderr.isatty(),
            )  # fmt: skip
        finally:
            paths.schedule.unlink(missing_ok=True)


@contextmanager
def _announced_failure(paths: Paths) -> Iterator[None]:
    """Announce to the webhooks that the schedule could not run; failed retrainings announce themselves."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        yield
    except StageError as error:
        if (params := last_readable_params(Git(paths.root))) is not None:
            name = params.project.name
            summary = f"the schedule of {name} stopped: {error}"
            data = {"started": started, "reason": str(error), "summary": summary}
            try_to_announce(params, paths.root, Event("failure", name, f"schedule {started}", data))
        raise


def _deliver_webhooks(paths: Paths) -> None:
    """Send webhooks that are due while the schedule runs."""
    while True:
        time.sleep(SECONDS_BETWEEN_DELIVERIES)
        try:
            if (params := last_readable_params(Git(paths.root))) is not None:
                try_to_deliver(params, paths.root)
        except RepositoryError as error:  # of git; the next look may succeed
            logger.warning("webhooks: %s", error)


@contextmanager
def _server(paths: Paths) -> Iterator[str]:
    """Give the address of a Prefect server, started here unless PREFECT_API_URL names one."""
    if running := os.environ.get("PREFECT_API_URL"):
        yield running
        return
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    options = ["--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    command = [sys.executable, "-m", "prefect", "server", "start", *options]
    log = paths.root / ".prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=die_with_parent)
    try:
        _wait(process, url, str(log))
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], url: str, log: str) -> None:
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise StageError(f"Prefect's server did not start within {SECONDS_TO_START:g} seconds; see {log}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
