"""A repository to sweep over; a Prefect server on PostgreSQL with workers, on 127.0.0.1 and gone after the tests."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from sweep_cases import SWEPT_STAGE

ROOT = Path(__file__).parents[3]
POOL = "peftcore"
SECONDS = 120.0
"""In which whatever a test waits for must come, however busy the machine."""
STAGE = """\
import ctypes, os, shutil, sys, time
from pathlib import Path

ctypes.CDLL(None).prctl(1, 9)  # as every stage: it dies with DVC
me = os.environ.get("PREFECT__FLOW_RUN_ID", "sweep")
with open(os.environ["LEDGER"], "a") as ledger:
    print("start", me, os.getpid(), time.monotonic(), file=ledger, flush=True)
    if os.environ.get("FAIL_ONCE") and not Path(me).exists():
        Path(me).touch()
        sys.exit("error: the first try fails")
    time.sleep(float(os.environ.get("SLEEP", "0.3")))
    print("end", me, os.getpid(), time.monotonic(), file=ledger, flush=True)
for name in ("evaluation", "training"):
    shutil.copytree(f"source/{name}", f"artifacts/{name}")
"""
"""A stage that notes when it began and ended, waits in between, and fails a first time where it is told to."""
DVC_YAML = """\
stages:
  make:
    cmd: exec python make.py
    always_changed: true
    outs: [artifacts/evaluation, artifacts/training]
artifacts:
  docstrings: {path: artifacts/adapter, type: model}
"""
Value = TypeVar("Value")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(get: Callable[[], Value], seconds: float = SECONDS) -> Value:
    """What `get` gives as soon as it is something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := get():
            return value
        time.sleep(0.2)
    raise TimeoutError(f"it did not come within {seconds:g} seconds")


@dataclass
class Prefect:
    """A server, a pool of processes, two workers, and a repository whose flows are deployed there by prefect.yaml."""

    root: Path
    home: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "LEDGER": str(self.root / "ledger"),
            "PEFTCORE_POOL": POOL,
            "PEFTCORE_ROOT": str(self.root),
            "DO_NOT_TRACK": "1",
        }

    def start(self, name: str, *arguments: str, **environment: str) -> None:
        """Start `prefect ...`, its output in a log."""
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=self.root,
                env=self.environment | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    def command(self, *arguments: str) -> str:
        """Run `prefect ...` and return what it printed."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def api(self, method: str, path: str, **body: Any) -> Any:
        response = httpx.request(method, f"http://127.0.0.1:{self.port}/api/{path}", json=body or None, timeout=30)
        response.raise_for_status()
        return response.json() if response.content else None

    def is_ready(self) -> bool:
        assert self.processes["server"].poll() is None, self.log("server")
        try:
            return self.api("GET", "health")
        except httpx.HTTPError:
            return False

    def start_worker(self, name: str) -> None:
        self.start(name, "worker", "start", "--pool", POOL, "--name", name, "--type", "process")

    def trigger(self, parameters: dict[str, Any] | None = None, **environment: str) -> str:
        """Ask for a run of the pipeline, with these variables for its stages; its id."""
        deployment = self.api("GET", "deployments/name/pipeline/on-demand")
        env = deployment["job_variables"]["env"] | environment
        body = {"parameters": parameters or {}, "job_variables": {"env": env}}
        return self.api("POST", f"deployments/{deployment['id']}/create_flow_run", state={"type": "SCHEDULED"}, **body)[
            "id"
        ]

    def run(self, flow_run: str) -> dict[str, Any]:
        return self.api("GET", f"flow_runs/{flow_run}")

    def states(self, flow_run: str) -> list[str]:
        """The names of all states that a run went through."""
        return [state["name"] for state in self.api("GET", f"flow_run_states/?flow_run_id={flow_run}")]

    def is_final(self, flow_run: str) -> bool:
        return self.run(flow_run)["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    def ended(self, *flow_runs: str, seconds: float = SECONDS) -> list[str]:
        """The last states of these runs, once they have ended."""
        wait_for(lambda: all(self.is_final(one) for one in flow_runs), seconds)
        return [self.run(one)["state_type"] for one in flow_runs]

    def ledger(self, flow_run: str | None = None) -> list[tuple[str, str, int, float]]:
        """What the stage noted: start or end, the run, its process, when."""
        path = self.root / "ledger"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(what, run, int(pid), float(when)) for what, run, pid, when in lines if flow_run in (None, run)]

    def stage_of(self, flow_run: str) -> int:
        """The process of a run's stage, once it works."""
        return wait_for(lambda: [pid for _, _, pid, _ in self.ledger(flow_run)])[0]

    def worker_of(self, flow_run: str) -> str:
        """Which worker took a run."""
        return next(name for name in ("one", "two") if f"/flow-run/{flow_run}" in self.log(name))

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                for child in children:
                    if child.is_running():
                        child.kill()


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL of its own in `folder`; its URL for Prefect. It refuses to run as root, who starts it as another."""
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    data, port = folder / "data", free_port()
    data.mkdir(parents=True)
    if user:
        shutil.chown(data, "postgres", "postgres")
        for parent in data.parents:
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o001)
    run: dict[str, Any] = {"cwd": data, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    subprocess.run(["initdb", "--auth=trust", "--username=prefect", "--no-sync", f"--pgdata={data}"], check=True, **run)
    settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
    options = [word for setting in settings for word in ("-c", setting)]
    server = subprocess.Popen(["postgres", "-D", str(data), *options], **run)
    try:
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


@pytest.fixture(scope="module")
def prefect(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """The server with PostgreSQL, the real prefect.yaml deployed there for a tiny repository, and two workers."""
    if shutil.which("postgres") is None or shutil.which("initdb") is None:
        pytest.skip("no PostgreSQL here (`apt-get install postgresql`, its bin folder in PATH)")
    pytest.importorskip("asyncpg")
    folder = tmp_path_factory.mktemp("prefect")
    root, home = folder / "project", folder / "home"
    shutil.copytree(template, root, symlinks=True)
    home.mkdir()
    shutil.copyfile(ROOT / "prefect.yaml", root / "prefect.yaml")
    shutil.copytree(ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "flows.stages.register"], cwd=root, check=True, capture_output=True)
    (root / "make.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(DVC_YAML)
    server = Prefect(root, home)
    with postgres(folder / "postgres") as url:
        server.start(
            "server",
            *("server", "start", "--host", "127.0.0.1", "--port", str(server.port)),
            PREFECT_API_DATABASE_CONNECTION_URL=url,
            PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
            PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS="1",
        )
        try:
            wait_for(server.is_ready)
            server.command("work-pool", "create", POOL, "--type", "process")
            server.command("deploy", "--name", "on-demand")
            for name in ("one", "two"):
                server.start_worker(name)
            yield server
        finally:
            server.stop()


@pytest.fixture
def swept(project: Any) -> Any:
    """The tiny repository, whose stage now gives a validation loss that depends on two parameters."""
    root = project.root
    (root / "make.py").write_text(SWEPT_STAGE.replace("SHARED", repr(str(root.parent / "worked"))))
    (root / "params.yaml").write_text(
        (root / "params.yaml").read_text() + "train: {learning_rate: 0.001, batch_size: 8, epochs: 1}\n"
    )
    text = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(
        text.replace(
            "deps: [source, make.py]", "deps: [source, make.py]\n    params: [train.learning_rate, train.batch_size]"
        )
    )
    project.git("commit", "--quiet", "--all", "--message=Parameters")
    return project
