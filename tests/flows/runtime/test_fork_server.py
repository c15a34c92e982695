"""Stages as forks of one process with all imports: they behave as processes of their own, and none is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from waiting import eventually, is_gone

from flows.errors import StageError
from flows.runtime import fork_server
from flows.runtime.fork_server import ADDRESS
from flows.runtime.stage_process import environment_with_code, forked_stages, run_stage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux only")

PROBE = """\
from flows.runtime.fork_server import hand_over
from flows.runtime.stage import set_quiet_environment

set_quiet_environment()
hand_over()

import json, os, pathlib, signal, sys, time
import flows

facts = {
    "pid": os.getpid(),
    "is_fork": "torch" in sys.modules,
    "argv": sys.argv[1:],
    "name": sys.modules["__main__"].__spec__.name,
    "folder": os.getcwd(),
    "path": sys.path[0],
    "stage": os.environ.get("DVC_STAGE"),
    "address": os.environ.get("PEFTCORE_FORK_SERVER"),
    "code": flows.__file__,
}
if facts["is_fork"]:
    import torch

    facts["sum"] = torch.ones(1 << 20).sum().item()
print(json.dumps(facts), flush=True)
pathlib.Path("facts.json").write_text(json.dumps(facts))
what, *_ = [*sys.argv[1:], "end"]
if what == "exit":
    sys.exit(int(sys.argv[2]))
if what == "die":
    os.kill(os.getpid(), int(sys.argv[2]))
if what == "table":
    import wandb

    with wandb.init(mode="offline", dir=".", settings=wandb.Settings(silent=True)) as run:
        run.log({"rows": wandb.Table(columns=["text"], data=[[sys.argv[2]]])})
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").touch(), sys.exit(143)))
    pathlib.Path("ready").touch()
    while True:
        time.sleep(0.05)
"""
DVC_YAML = """\
stages:
  probe: {cmd: exec python -m probe wait_not, deps: [probe.py], outs: [facts.json]}
  fetch: {cmd: exec python -m flows.stages.fetch}
"""
DRIVER = """\
from pathlib import Path
from flows.runtime.stage_process import forked_stages, run_stage
with forked_stages(Path.cwd()):
    run_stage(Path.cwd(), "probe", 300)
"""
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of stages while a server runs."""
    root = tmp_path_factory.mktemp("run")
    (root / "dvc.yaml").write_text(DVC_YAML)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with forked_stages(root):
            environment = environment_with_code(root)
            del os.environ[ADDRESS]  # the other tests of this process have no server
            yield environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


def start(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Start the probe as DVC starts a stage."""
    command, pipe = [sys.executable, "-m", "probe", *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(folder: Path, environment: dict[str, str], *arguments: str) -> int:
    """Run the probe as DVC runs a stage, and return its exit code."""
    with start(folder, environment, *arguments) as process:
        process.communicate(timeout=120)
    return process.returncode


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


def test_a_stage_is_a_fork_with_the_libraries_and_with_its_own_folder_arguments_and_output(
    server: dict[str, str], folder: Path
) -> None:
    with start(folder, server | {"DVC_STAGE": "probe"}, "end", "of it") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""
    assert json.loads(out) == facts(folder)
    assert facts(folder)["pid"] != process.pid
    assert {name: value for name, value in facts(folder).items() if name != "pid"} == {
        "is_fork": True,
        "argv": ["end", "of it"],
        "name": "probe",
        "folder": str(folder),
        "path": str(folder),
        "stage": "probe",
        "address": None,
        "code": str(ROOT / "flows" / "__init__.py"),
        "sum": float(1 << 20),
    }


def test_the_projects_own_code_is_imported_in_the_fork(server: dict[str, str], folder: Path) -> None:
    shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    assert run(folder, server) == 0
    assert facts(folder)["is_fork"] and facts(folder)["code"] == str(folder / "flows" / "__init__.py")


def test_each_stage_logs_a_table_to_wandb(server: dict[str, str], folder: Path) -> None:
    for number in (1, 2):
        assert run(folder, server, "table", f"row {number}") == 0
        assert facts(folder)["is_fork"]
        assert len(list(folder.glob("wandb/offline-run-*/files/media/table/*.json"))) == number


@pytest.mark.parametrize(
    ("arguments", "code"), [(("exit", "3"), 3), (("die", "11"), -signal.SIGSEGV), (("die", "9"), -signal.SIGKILL)]
)
def test_the_process_ends_as_its_fork(server: dict[str, str], folder: Path, arguments: Any, code: int) -> None:
    assert run(folder, server, *arguments) == code and facts(folder)["is_fork"]


def test_a_stage_with_other_variables_or_options_of_python_imports_for_itself(
    server: dict[str, str], folder: Path
) -> None:
    for environment, options in ((server | {"OMP_NUM_THREADS": "7"}, []), (server, ["-O"])):
        command = [sys.executable, *options, "-m", "probe"]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
        assert not facts(folder)["is_fork"]


def test_sigterm_reaches_the_fork_which_saves_its_state(server: dict[str, str], folder: Path) -> None:
    with start(folder, server, "wait") as process:
        assert eventually((folder / "ready").exists)
        process.terminate()
        assert process.wait(60) == 143 and (folder / "saved").exists()


def test_sigint_to_the_group_reaches_the_fork_only_once(folder: Path) -> None:
    (folder / "dvc.yaml").write_text(DVC_YAML)
    with subprocess.Popen(
        [sys.executable, "-c", GROUP], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True
    ) as process:
        ready = eventually((folder / "ready").exists)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    assert ready
    assert eventually(lambda: is_gone(facts(folder)["pid"]))


GROUP = """\
import os, signal, subprocess, sys
from pathlib import Path
from flows.runtime.stage_process import environment_with_code, forked_stages
signal.signal(signal.SIGINT, signal.default_int_handler)
with forked_stages(Path.cwd()):
    command = [sys.executable, "-m", "probe", "wait"]
    process = subprocess.Popen(command, env=environment_with_code(Path.cwd()))
    try:
        process.wait()
    except KeyboardInterrupt:
        process.wait()
        sys.exit(130)
"""


@pytest.mark.faults("kill -9 of dvc, flow or stage")
def test_kill_9_of_the_process_that_waits_kills_the_fork(server: dict[str, str], folder: Path) -> None:
    with start(folder, server, "wait") as process:
        assert eventually((folder / "ready").exists)
        process.kill()
    assert eventually(lambda: is_gone(facts(folder)["pid"]))
    assert run(folder, server) == 0 and facts(folder)["is_fork"]


@pytest.mark.faults("kill -9 of dvc, flow or stage")
def test_kill_9_of_the_run_leaves_neither_server_nor_fork(project: Any) -> None:
    root = project.root
    (root / "dvc.yaml").write_text(DVC_YAML.replace("wait_not", "wait"))
    (root / "probe.py").write_text(PROBE)
    with subprocess.Popen([sys.executable, "-c", DRIVER], cwd=root, env=os.environ | {"PYTHONPATH": str(ROOT)}) as run:
        ready = eventually((root / "ready").exists)
        below = [process.pid for process in psutil.Process(run.pid).children(recursive=True)]
        run.kill()
    assert ready and facts(root)["pid"] in below and facts(root)["is_fork"]
    assert eventually(lambda: all(is_gone(pid) for pid in below))


def test_a_server_that_is_killed_ends_its_stage_and_the_next_one_imports_for_itself(project: Any) -> None:
    root = project.root
    (root / "dvc.yaml").write_text(DVC_YAML.replace("wait_not", "wait"))
    (root / "probe.py").write_text(
        PROBE.replace("touch()\n    while", "touch()\n    os.kill(os.getppid(), 9)\n    while")
    )
    with forked_stages(root):
        with pytest.raises(StageError, match="stage probe failed"):
            run_stage(root, "probe", 300)
        assert facts(root)["is_fork"] and eventually(lambda: is_gone(facts(root)["pid"]))
        (root / "probe.py").write_text(PROBE.replace('"wait"', '"never"'))
        run_stage(root, "probe", 300)
    assert not facts(root)["is_fork"]


def test_a_machine_with_an_accelerator_has_no_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not fork_server._import_libraries()


def test_forks_that_hang_in_pytorch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "SECONDS_TO_COMPUTE", 0.2)
    monkeypatch.setattr(torch, "ones", lambda *_: time.sleep(60))
    assert not fork_server._can_compute()


def test_a_pipeline_of_other_programs_has_no_server(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {make: {cmd: exec python make.py}}\n")
    with forked_stages(tmp_path):
        assert ADDRESS not in os.environ
