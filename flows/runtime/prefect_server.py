"""Prefect's temporary server, whose lifetime is bound to the process that started it.

Prefect starts the server in the terminal's process group and does not end it when the flow is killed. Ctrl-C then ended
the server first, and the flow waited minutes for answers; after a kill the server ran on. At the end of a flow the
server ends in the middle of work of its own, and its libraries log errors, such as a database query that is cancelled.
"""

import logging
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from flows.runtime.prefect_database import copy_empty_database, keep_empty_database
from flows.runtime.processes import die_with_parent

LIBRARY_LEVEL = {"PREFECT_LOGGING_ROOT_LEVEL": "CRITICAL"}
"""Level of the log of the server's libraries; Prefect's own loggers have levels of their own."""
logger = logging.getLogger(__name__)


@contextmanager
def tied_temporary_server() -> Iterator[None]:
    """Make Prefect's temporary server, which a flow starts, ignore Ctrl-C and end with the thread that starts it.

    A configured server (PREFECT_API_URL) is left alone.
    """
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is not None:
        yield
        return
    copy_empty_database()
    logger.info("starting Prefect's server")
    from prefect.server.api import server

    # Prefect has no option for starting its server
    server.subprocess = SimpleNamespace(Popen=_start, TimeoutExpired=subprocess.TimeoutExpired)  # pyright: ignore
    yield
    keep_empty_database()


def _start(args: list[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
    environment = None if env is None else LIBRARY_LEVEL | dict(env)
    tied: dict[str, Any] = {"start_new_session": True, "preexec_fn": die_with_parent}
    return subprocess.Popen(args, env=environment, **options, **tied)
