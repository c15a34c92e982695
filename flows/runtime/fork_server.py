"""A process that has imported PyTorch and Transformers, of which the stages of a run are forks.

Imports take 4 to 8 seconds of a stage's process and 0.3 to 0.8 of a fork, which has most of them already (2 cores of an
AMD EPYC); whole stages take 2 to 6 seconds less.

Three processes take part. A run starts the server (`flows.runtime.stage_process.forked_stages`). DVC starts
`python -m flows.stages.NAME`, which asks the server for a fork, waits for it, and ends as the fork has ended
(`hand_over`). The fork does the stage's work.

A stage that gets no fork does its own imports, with the same results. That is so without a run (`dvc repro`), outside
of Linux, where libraries do not support forks, and with an accelerator, because CUDA cannot be used in a fork. Modules
of this project are imported in the fork, so that it runs the code that its folder has by then.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from flows.runtime import logs
from flows.runtime.processes import die_with_parent
from flows.runtime.progress import RUN
from flows.runtime.stage import set_quiet_environment, spare_last_collection

ADDRESS = "PEFTCORE_FORK_SERVER"
"""Environment variable with the path of the server's socket."""

LIBRARIES = (
    "bitsandbytes",  # it imports PyTorch's compiler, too
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.trainer",
    "datasets",
    "datasketch",
    "gguf",
    "rouge_score.rouge_scorer",
    "dvc.repo",
)
"""What takes most of the time of a stage's imports, beside PyTorch.

None may make temporary files when it is imported, as W&B does: the first fork would remove those of all when it ends.
"""

OWN_VARIABLES = ("_", "DVC_ROOT", "OLDPWD", "PWD", "SHLVL", logs.STAGE, RUN)
"""Environment variables that differ between stages. Libraries may have read any other one when they were imported."""

SECONDS_TO_COMPUTE = 30.0
"""Seconds after which a fork that computes something small is taken to hang."""


def hand_over() -> None:
    """Let a fork run the module that Python was told to run by `-m`, and exit as the fork does.

    Returns if there is no server, or if it refuses, and this process has to run the module. SIGTERM is passed on to the
    fork. SIGINT is not, because a terminal sends it to the fork as well.
    """
    address = os.environ.pop(ADDRESS, None)
    if address is None or sys.orig_argv[1] != "-m":  # a fork would lack Python's own options
        return
    request = {
        "python": sys.executable,
        "module": sys.orig_argv[2],
        "arguments": sys.orig_argv[3:],
        "folder": str(Path.cwd()),
        "path": sys.path,
        "environment": dict(os.environ),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [b"\n"], [0, 1, 2])
            connection.sendall(json.dumps(request).encode() + b"\n")
            answers = connection.makefile("r")
            fork = answers.readline()
        except OSError:  # the server has ended, because of an accelerator or with the run
            return
        if not fork:
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(int(fork), signal.SIGTERM))
        _exit_as(int(answers.readline() or -signal.SIGKILL))


def _exit_as(code: int) -> NoReturn:
    """Exit with this code, or be killed by the signal of which it is the negative number."""
    if code < 0:
        if code != -signal.SIGKILL:  # which has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def main(descriptor: int) -> None:
    """Import the libraries and fork for each request; run the stage's module in the forks.

    Args:
        descriptor: A listening socket.
    """
    os.environ.pop(ADDRESS, None)  # of a run around this one
    set_quiet_environment()
    environment = dict(os.environ)  # before the imports, some of which set variables
    gc.disable()
    with socket.socket(fileno=descriptor) as listener:
        # the run ends this process; a system that stops a group of processes gives a stage time to save its state
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        if not _import_libraries():
            return
        gc.freeze()
        request = _serve(listener, environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.enable()
    atexit.register(spare_last_collection)
    _become(request)
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _import_libraries() -> bool:
    """Return True if forks of this process can do the work of a stage."""
    import torch

    if torch.accelerator.is_available():
        return False
    for name in LIBRARIES:
        with suppress(ModuleNotFoundError):  # of an extra that is not installed
            importlib.import_module(name)
    return _can_compute()


def _can_compute() -> bool:
    """Return False if a fork hangs or dies in PyTorch, because a library has started OpenMP's threads meanwhile."""
    import torch

    fork = _fork()
    if not fork:
        torch.ones(1 << 20).sum()
        os._exit(0)
    return _exit_code(fork, [], SECONDS_TO_COMPUTE) == 0


def _serve(listener: socket.socket, environment: Mapping[str, str]) -> dict[str, Any]:
    """Serve one request after the other; return in forks only, with the request."""
    while True:
        connection, _ = listener.accept()
        with connection, suppress(OSError, ValueError):  # a stage was killed while it asked
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            request = json.loads(connection.makefile("r").readline())
            alike = _shared(request["environment"]) == _shared(environment) and request["python"] == sys.executable
            fork = _fork() if alike else None
            if fork == 0:
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                return request
            for stream in streams:
                os.close(stream)
            if fork is not None:
                with suppress(OSError):  # the other side is gone, which the next line sees, too
                    connection.sendall(b"%d\n" % fork)
                connection.sendall(b"%d\n" % _exit_code(fork, [connection]))


def _fork() -> int:
    server = os.getpid()
    with warnings.catch_warnings():
        # the threads are those of OpenBLAS and jemalloc, which start them again in a fork
        warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
        fork = os.fork()
    if not fork:
        die_with_parent()
        if os.getppid() != server:  # it has ended already
            os._exit(1)
    return fork


def _exit_code(fork: int, others: Sequence[socket.socket], seconds: float | None = None) -> int:
    """Wait for a fork; kill it after these seconds, or when one of the `others` closes its end of the connection."""
    end = os.pidfd_open(fork)
    ready, _, _ = select.select([end, *others], [], [], seconds)
    if end not in ready:
        os.kill(fork, signal.SIGKILL)
    os.close(end)
    return os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])


def _shared(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OWN_VARIABLES}


def _become(request: Mapping[str, Any]) -> None:
    """Give this process the folder, arguments, module path and variables of the process that made the request."""
    os.chdir(request["folder"])
    for name in OWN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in request["environment"].items() if name in OWN_VARIABLES})
    sys.argv[:] = [request["module"], *request["arguments"]]
    sys.path[:] = request["path"]
    for name in [name for name in sys.modules if name.partition(".")[0] in logs.OURS]:
        del sys.modules[name]
    importlib.invalidate_caches()


if __name__ == "__main__":
    main(int(sys.argv[1]))
