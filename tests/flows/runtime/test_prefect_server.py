"""Prefect's temporary server: out of reach of the terminal's Ctrl-C, and never longer alive than its flow."""

import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.server.api import server
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.runtime.prefect_server import tied_temporary_server

TELL = """\
import ctypes, os
asked = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(asked))  # PR_GET_PDEATHSIG
print(os.getsid(0), asked.value)
"""
"""Prints the session of its process, and the signal that it gets when its parent ends."""


@pytest.fixture(autouse=True)
def untied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Prefect start its server by itself, before and after the test, and write nothing to the home folder."""
    monkeypatch.setattr(server, "subprocess", subprocess)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with temporary_settings({PREFECT_HOME: tmp_path}):
        yield


def test_a_configured_server_is_left_alone() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}), tied_temporary_server():
        assert server.subprocess is subprocess


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_temporary_server_is_in_a_session_of_its_own_and_dies_with_its_parent() -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}), tied_temporary_server():
        pass
    start: Any = server.subprocess.Popen
    with start([sys.executable, "-c", TELL], stdout=subprocess.PIPE, text=True) as process:
        session, asked = map(int, process.communicate()[0].split())
    assert session == process.pid != os.getsid(0)
    assert asked == signal.SIGKILL


def test_errors_of_the_servers_libraries_are_not_logged() -> None:
    """They come from work that the end of the flow interrupts; Prefect's own errors are logged."""
    code = (
        "import logging, prefect.logging.configuration as one; one.setup_logging(); loggers = map(logging.getLogger, "
        "('sqlalchemy.pool', 'prefect.server')); print(*(one.isEnabledFor(logging.ERROR) for one in loggers))"
    )
    with temporary_settings(restore_defaults={PREFECT_API_URL}), tied_temporary_server():
        pass
    start: Any = server.subprocess.Popen
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING")}
    with start(args=[sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0].split() == ["False", "True"]


def test_prefect_still_finds_what_it_uses_of_the_module() -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}), tied_temporary_server():
        pass
    used = set(re.findall(r"\bsubprocess\.(\w+)", inspect.getsource(server)))
    assert "Popen" in used
    assert [name for name in sorted(used) if not hasattr(server.subprocess, name)] == []
