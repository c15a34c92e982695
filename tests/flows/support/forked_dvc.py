"""DVC commands without the half second of DVC's imports: one parent imports DVC and forks a process for each command.

A command is still a process of its own with its own folder, environment, output and exit status. Only the interpreter's
start and the imports are shared.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

MODULES = (
    *("configobj", "dulwich.index", "dulwich.worktree", "flatten_dict", "networkx", "rich.live", "rich.table"),
    *("dvc.data_cloud", "dvc.dvcfile", "dvc.fs.git", "dvc.stage.cache"),
    *("dvc.repo.artifacts", "dvc.repo.datasets", "dvc.repo.experiments", "dvc.repo.graph", "dvc.repo.index"),
    *("dvc.repo.metrics.show", "dvc.repo.open_repo", "dvc.repo.params.show", "dvc.repo.plots", "dvc.repo.stage"),
    *("dvc.repo.worktree", "dvc.utils.strictyaml", "dvc_http", "scmrepo.fs"),
    *("dvc_data.fs", "dvc_data.hashfile.status", "dvc_data.index.checkout", "dvc_data.index.fetch"),
    *("dvc_data.index.push", "ruamel.yaml", "scmrepo.git.lfs"),
)
"""Modules that DVC imports during a command; pygit2 reads the environment on import and is left out."""


class Run:
    """A DVC command, with the methods of `subprocess.Popen` that the pipeline uses."""

    def __init__(self, answers: socket.socket) -> None:
        self._answers = answers.makefile("r")
        self.returncode: int | None = None
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("dvc", timeout or 0.0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit status; None if the command runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the command at once."""
        os.kill(self.pid, signal.SIGKILL)


class ForkedDvc:
    """The parent of the commands. It starts with the first command and ends with this process or by `close`."""

    def __init__(self) -> None:
        self._requests: socket.socket | None = None
        self._parent: subprocess.Popen[bytes] | None = None

    def popen(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int,
        stderr: int,
        preexec_fn: object = None,
    ) -> Run:
        """Start a command, as `subprocess.Popen` does; `preexec_fn` is not called."""
        assert command[1:3] == ["-m", "dvc"], command
        if self._requests is None:
            self._start()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            out, err = (os.open(os.devnull, os.O_WRONLY) if one == subprocess.DEVNULL else os.dup(one)
                        for one in (stdout, stderr))  # fmt: skip
            try:
                assert self._requests is not None
                socket.send_fds(self._requests, [b"."], [theirs.fileno(), out, err])
            finally:
                os.close(out)
                os.close(err)
            theirs.close()
            ours.sendall(json.dumps([str(cwd), list(command[3:]), dict(env)]).encode())
            ours.shutdown(socket.SHUT_WR)
            return Run(ours)

    def run(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], **_: Any) -> Any:
        """Run a command and capture its output as text, as `subprocess.run` does if it is asked to."""
        with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
            status = self.popen(command, cwd=cwd, env=env, stdout=out.fileno(), stderr=err.fileno()).wait()
            texts = [file.seek(0) or file.read() for file in (out, err)]
        return subprocess.CompletedProcess(command, status, *texts)

    def as_subprocess(self) -> Any:
        """Return what takes the place of the module `subprocess` where only DVC is started."""
        return SimpleNamespace(
            run=self.run, Popen=self.popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
        )

    def close(self) -> None:
        if self._requests is not None and self._parent is not None:
            self._requests.close()
            self._parent.wait()

    def _start(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self._parent = subprocess.Popen(
                [sys.executable, __file__, str(number)], stdin=subprocess.DEVNULL, pass_fds=[number]
            )


def serve(requests: socket.socket) -> None:
    """Fork a process for each request, until the other end is closed."""
    from dvc.cli.parser import get_main_parser

    get_main_parser()
    for name in MODULES:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1, 3)
        _collect(os.WNOHANG if message else 0)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            os._exit(_wait_for_command(*files))
        for file in files:
            os.close(file)


def _collect(options: int) -> None:
    """Wait for processes that have ended, so that their processor time counts as this one's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _wait_for_command(connection: int, out: int, err: int) -> int:
    """Run a command in one more process and tell its number, then its exit status."""
    with socket.socket(fileno=connection) as answers:
        with answers.makefile("r") as request:
            cwd, arguments, environment = json.load(request)
        child = os.fork()
        if child == 0:
            answers.close()
            _become(cwd, arguments, environment, out, err)
        answers.sendall(f"{child}\n".encode())
        os.close(out)
        os.close(err)
        _, status = os.waitpid(child, 0)
        answers.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return 0


def _become(cwd: str, arguments: list[str], environment: dict[str, str], out: int, err: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        for old, new in ((out, 1), (err, 2)):
            os.dup2(old, new)
            os.close(old)
        from dvc.cli import main

        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        serve(inherited)
