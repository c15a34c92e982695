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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from flows.errors import BusyError, ParamsError, RepositoryError, StageError
from flows.paths import Paths
from flows.retraining.committed import last_readable_params
from flows.retraining.tree import home
from flows.runtime.cron import next_time
from flows.runtime.git import Git
from flows.runtime.locks import exclusive_if_free
from flows.runtime.prefect_database import copy_empty_database, keep_empty_database
from flows.runtime.processes import die_with_parent, this_host
from flows.webhooks import Event, try_to_announce, try_to_deliver
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_DELIVERIES = 30.0
"""Seconds between two looks for webhooks that are due."""
SECONDS_BETWEEN_STARTS = 5.0
"""Seconds between the end of the server and its next start."""
SECONDS_TO_START = 180.0
"""Time limit for the server's start; the first start may migrate a database."""


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
        BusyError: another schedule of this project runs.
        StageError: the server did not start.
    """
    is_ours = not os.environ.get("PREFECT_API_URL")
    # before the import of prefect, which reads it: without it, Prefect starts a temporary server beside this one
    url = os.environ["PREFECT_API_URL"] = os.environ.get("PREFECT_API_URL") or f"http://127.0.0.1:{_free_port()}/api"
    from prefect.client.schemas.schedules import CronSchedule

    try:
        next_time(cron, timezone, datetime.now(UTC))
    except ValueError as error:
        raise ParamsError(
            f"--cron {cron!r} in --timezone {timezone!r}: {error}; give five fields such as '0 3 * * 1' "
            "and a zone such as Europe/Berlin"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=_deliver_webhooks, args=(paths,), daemon=True).start()
    with _only_one(paths), _announced_failure(paths), _server(paths, url) if is_ours else nullcontext():
        from flows.retraining.flow import retrain

        note = {"cron": cron, "timezone": timezone, "pid": os.getpid(), "host": this_host(), "server": url}
        write_atomically(paths.schedule, json.dumps(note) + "\n")
        following = next_time(cron, timezone, datetime.now(UTC)).isoformat(timespec="minutes")
        logger.info(
            "retraining of %s at the times %r (%s), next %s; Ctrl-C or SIGTERM ends the schedule",
            paths.root,
            cron,
            timezone,
            following,
        )
        try:
            when = CronSchedule(cron=cron, timezone=timezone)
            options: dict[str, Any] = {"root": str(paths.root), "push_to": push_to}
            retrain.serve(
                name="scheduled", schedules=[when], parameters=options, limit=1, pause_on_shutdown=False,
                print_starting_message=False,
            )  # fmt: skip
        finally:
            paths.schedule.unlink(missing_ok=True)


@contextmanager
def _only_one(paths: Paths) -> Iterator[None]:
    """Hold the lock of the schedule. Two would share `paths.schedule`, which the first one to end removes."""
    with exclusive_if_free(home(paths.root) / "schedule.lock") as is_mine:
        if not is_mine:
            raise BusyError(
                f"busy: a schedule of {paths.root} runs already; `peftcore status` shows it, and ending its process "
                "makes room for another"
            )
        yield


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
def _server(paths: Paths, url: str) -> Iterator[None]:
    """Run a Prefect server at an address of this host while the context is open."""
    options = ["--host", "127.0.0.1", "--port", str(urlsplit(url).port), "--no-ui"]
    command = [sys.executable, "-m", "prefect", "server", "start", *options]
    log = paths.root / ".prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    copy_empty_database()
    server = _Server(command, log)
    try:
        _wait(server.process, url, str(log))
        keep_empty_database()
        threading.Thread(target=server.watch, daemon=True).start()
        yield
    finally:
        server.stop()


class _Server:
    """The process of a Prefect server, which is started again if it ends.

    Without a server, the schedule would go on without a message, and never retrain.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Start the server. log: file to which its output is appended."""
        self._command, self._log = command, log
        self._stops, self._lock = threading.Event(), threading.Lock()
        self.process = self._start()

    def watch(self) -> None:
        """Start the server again whenever it ends, until `stop`."""
        while True:
            status = self.process.wait()
            if self._stops.wait(SECONDS_BETWEEN_STARTS):
                return
            with self._lock:
                if self._stops.is_set():
                    return
                logger.warning("Prefect's server ended with status %d; it is started again; see %s", status, self._log)
                self.process = self._start()

    def stop(self) -> None:
        """End the server."""
        with self._lock:
            self._stops.set()
        self.process.terminate()
        self.process.wait(30)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as output:
            # in a session of its own, because Ctrl-C and `timeout` send their signal to the whole process group, and
            # this process would wait for minutes for a server that has ended
            return subprocess.Popen(
                self._command, stdout=output, stderr=output, start_new_session=True, preexec_fn=die_with_parent
            )


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
