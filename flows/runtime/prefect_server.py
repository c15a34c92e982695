"""Prefect's temporary server, whose lifetime is bound to the process that started it.

Prefect starts the server in the terminal's process group and does not end it when the flow is killed. Ctrl-C then ended
the server first, and the flow waited minutes for answers; after a kill the server ran on.
"""

import logging
import subprocess
from functools import partial
from types import SimpleNamespace

from flows.runtime.processes import die_with_parent

logger = logging.getLogger(__name__)


def tie_temporary_server() -> None:
    """Make Prefect's temporary server ignore Ctrl-C and end with the thread that starts it.

    A configured server (PREFECT_API_URL) is left alone.
    """
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is not None:
        return
    logger.info("starting Prefect's server; its first start in a folder makes a database, which takes a while")
    from prefect.server.api import server

    # Prefect has no option for starting its server
    popen = partial(subprocess.Popen, start_new_session=True, preexec_fn=die_with_parent)
    server.subprocess = SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired)  # pyright: ignore
