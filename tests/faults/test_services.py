"""Services that are down, or go down in the middle: the run finishes without them."""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import DVC, PEFTCORE, done, eventually, left_in, started, told
from stage_nursery import Nursery, said

from flows.paths import Paths

WANDB, PREFECT = "W&B down or dying", "Prefect down"
NO_PREFECT = """\
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "prefect":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Blocked())
"""
"""A sitecustomize.py for a machine on which Prefect is not installed."""


# -- W&B ---------------------------------------------------------------------------------------------------------------


DYING = """\
import json, pathlib, psutil, sys, time
from flows.runtime.tracking import Tracker

tracker = Tracker("p", "offline", {}, pathlib.Path.cwd())
tracker.log({"step": 1, "loss": 2.0})
children = psutil.Process().children(recursive=True)
service = [child for child in children if "wandb-core" in " ".join(child.cmdline())]
for process in service:
    process.kill()
psutil.wait_procs(service, 10)
began = time.monotonic()
for step in range(2, 200):
    tracker.log({"step": step, "loss": 1.0})
tracker.finish({"steps": 200})
print(json.dumps([len(service), time.monotonic() - began]))
"""
"""A tracked run that loses W&B's own process."""


@pytest.mark.proof
def test_wandbs_service_dies_in_the_middle(tmp_path: Path, fault: Any) -> None:
    with fault(WANDB):
        run = done(tmp_path, sys.executable, "-c", DYING)
        assert run.returncode == 0, run.stderr
        killed, seconds = json.loads(run.stdout.splitlines()[-1])
        assert killed and seconds < 30
        assert run.stderr.count("the run continues, and its own log is complete") == 1


@pytest.mark.proof
def test_no_server_of_wandb_answers(
    prepared: Paths, tiny_params: Any, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    mine = Nursery()  # the environment is that of its start
    try:
        with fault(WANDB):
            prepared.params.write_text(tiny_params(tracking={"mode": "online"}).model_dump_json())
            status, seconds = mine.run(prepared.root, "train")
            assert status == 0 and seconds < 300, said(prepared.root)
            assert "the run continues" in said(prepared.root)
            assert json.loads(prepared.training_summary.read_text())["steps"] == 8
    finally:
        mine.close()


# -- Prefect -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof
def test_dvc_repro_needs_no_prefect(project: Any, tmp_path: Path, fault: Any) -> None:
    (tmp_path / "without" / "sitecustomize.py").parent.mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(NO_PREFECT)
    here = Path(__file__).parents[2]
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "without"), str(here)])}
    assert done(project.root, sys.executable, "-c", "import prefect", **variables).returncode == 1
    with fault(PREFECT):
        repro = done(project.root, *DVC, "repro", **variables)
        assert repro.returncode == 0, repro.stderr
        assert project.git("tag", "--list").split() == ["docstrings@v0.1.0"]


@pytest.mark.proof
def test_prefects_server_goes_down_during_the_run(project: Any, tmp_path: Path, fault: Any) -> None:
    root = project.root
    (root / "make.py").write_text(
        (root / "make.py").read_text() + "import pathlib, time\npathlib.Path('half').touch()\n"
        "while not pathlib.Path('go').exists():\n    time.sleep(0.02)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    state = tmp_path / "server"
    state.mkdir()
    command = (sys.executable, "-m", "prefect", "server", "start", "--port", str(port))
    url = f"http://127.0.0.1:{port}/api"
    with started(state, *command, PREFECT_HOME=str(state)) as server, fault(PREFECT):
        assert eventually(lambda: "Check out the dashboard" in told(state) or _answers(port), 120), told(state)
        with started(root, *PEFTCORE, "run", PREFECT_API_URL=url) as run:
            assert eventually((root / "half").exists, 120), told(root)
            server.kill()
            for process in left_in(state):
                process.send_signal(signal.SIGKILL)
            (root / "go").touch()
            assert run.wait(300) == 0, told(root)
        assert "continuing without it" in told(root)
        assert project.git("tag", "--list").split() == ["docstrings#champion#1", "docstrings@v0.1.0"]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
