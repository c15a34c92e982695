"""Prefect's temporary server, tied to the process that it serves.

Prefect starts it in the terminal's own group and never ends it where the flow is killed. So Ctrl-C took the server away
first, and the flow then waited minutes for its answers; after a kill it ran on for ever.
"""

import subprocess
from functools import partial
from types import SimpleNamespace

from flows.runtime.processes import die_with_parent


def tie_temporary_server() -> None:
    """Let the temporary server that Prefect may start here pass over Ctrl-C, and die with the thread that starts it.

    Does nothing where a server is configured (PREFECT_API_URL).
    """
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is not None:
        return
    from prefect.server.api import server

    # Prefect has no option for how its server is started
    popen = partial(subprocess.Popen, start_new_session=True, preexec_fn=die_with_parent)
    server.subprocess = SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired)  # pyright: ignore
