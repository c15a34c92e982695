"""How a stage starts and ends: quiet, seeded, one message and exit status 1 for what is refused."""

import errno
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from flows.errors import DataError
from flows.params import Params
from flows.paths import Paths
from flows.runtime import stage
from peftcore.errors import TrainingError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def started_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process running the tests must not die with its parent, nor keep a stage's handlers."""
    (tmp_path / "params.yaml").write_text("project: {seed: 7}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "watch_parent", lambda: None)
    monkeypatch.setattr(stage, "spare_garbage_collection", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


def ends(capsys: pytest.CaptureFixture[str], error: BaseException | None) -> tuple[int | str | None, str]:
    def run(params: Params, paths: Paths) -> None:
        if error:
            raise error

    with pytest.raises(SystemExit) as exited:
        stage.start(run)
    return exited.value.code, capsys.readouterr().err


def test_a_stage_that_is_done_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(capsys, None) == (0, "")


@pytest.mark.parametrize("error", [DataError("no rows"), TrainingError("no rows")])
def test_what_is_refused_is_one_message(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    assert ends(capsys, error) == (1, "error: no rows\n")


def test_a_full_disk_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    status, message = ends(capsys, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert status == 1
    assert message.startswith("error: the disk is full")


def test_a_missing_permission_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    status, message = ends(capsys, PermissionError(errno.EACCES, "Permission denied", "artifacts/.data.abc"))
    assert status == 1
    assert message.startswith("error: artifacts/.data.abc: Permission denied; allow this user to read and write it")


def test_ctrl_c_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(capsys, KeyboardInterrupt())[0] == 130


def test_a_bug_keeps_its_traceback() -> None:
    def run(params: Params, paths: Paths) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stage.start(run)


def test_an_input_that_changes_while_the_stage_runs_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "stage_name", lambda: "train")
    (tmp_path / "dvc.yaml").write_text("stages: {train: {params: [project.seed], deps: [rows]}}\n")

    seeds, finished = iter((8, 8)), []

    def run(params: Params, paths: Paths) -> Any:
        (tmp_path / "params.yaml").write_text(f"project: {{seed: {next(seeds)}}}\n")
        return lambda: finished.append(True)

    with pytest.raises(SystemExit) as exited:
        stage.start(run)
    assert exited.value.code == 1 and not finished
    with pytest.raises(SystemExit) as exited:
        stage.start(run)
    assert exited.value.code == 0 and finished
    expected = "error: project.seed of params.yaml changed while stage train ran, and its results belong to the former"
    assert capsys.readouterr().err.startswith(expected)


def test_wrong_params_stop_before_the_stage_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("zebra: 1\n")
    status, message = ends(capsys, AssertionError("it ran"))
    assert status == 1
    assert message.startswith("error: params.yaml:1: zebra: unknown key")


def test_the_stage_gets_the_current_folder_and_the_seed(tmp_path: Path) -> None:
    got = []
    for _ in range(2):
        with pytest.raises(SystemExit):
            stage.start(lambda params, paths: got.append((paths.root, random.random(), torch.rand(1).item())))
    assert got[0] == got[1]
    assert got[0][0] == tmp_path


def test_a_full_disk_is_known_by_its_text_and_through_other_errors() -> None:
    from_rust = RuntimeError("I/O error: No space left on device (os error 28)")
    assert stage.is_disk_full(from_rust)
    wrapped = ValueError("cannot write")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    assert stage.is_disk_full(wrapped)
    assert not stage.is_disk_full(OSError(errno.ENOENT, "no such file"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_known_from_numpy() -> None:
    with Path("/dev/full").open("wb") as file, pytest.raises(OSError) as full:
        numpy.zeros(100_000).tofile(file)
    assert full.value.errno is None and stage.is_disk_full(full.value)


@pytest.mark.parametrize("file", sorted((ROOT / "flows" / "stages").glob("*.py")), ids=lambda file: file.stem)
def test_a_stage_that_runs_as_main_logs_by_a_name_below_flows(file: Path) -> None:
    """`logs.set_up` shows information of such names only."""
    assert set(re.findall(r"getLogger\((.*?)\)", file.read_text())) <= {f'"flows.{file.stem}"'}


def test_a_variable_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    stage.set_quiet_environment()
    assert os.environ["WANDB_MODE"] == "online"
    assert os.environ["DO_NOT_TRACK"] == "1"


def test_importing_the_stages_sets_the_environment_before_anything_heavy() -> None:
    code = (
        "import os, sys, flows.stages; "
        "print(os.environ['HF_HUB_OFFLINE'], {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    clean = {key: value for key, value in os.environ.items() if key not in stage.QUIET_ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "set()"], done.stderr


@pytest.mark.slow  # bitsandbytes imports torch and the package kernels
def test_optional_kernels_of_bitsandbytes_are_not_mentioned() -> None:
    program = "from flows.runtime.stage import set_quiet_environment as quiet; quiet(); import bitsandbytes"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_stage_without_torch_does_not_wait_for_it() -> None:
    code = (
        "import random, sys, flows.stages.register; from flows.runtime.stage import set_seed; set_seed(7); "
        "print(random.random(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(random.Random(7).random()), "False"], done.stderr


def test_a_stage_imports_nothing_slow_that_it_does_not_need(tmp_path: Path) -> None:
    """One process imports one stage after the other, because torch and transformers take seconds."""
    unneeded = {
        "prepare": {"transformers.modeling_utils", "nltk", "matplotlib"},
        "train": {"nltk", "matplotlib"},
        "merge": {"nltk", "matplotlib"},
    }
    code = (
        f"import importlib, sys\nfor stage, unneeded in {unneeded}.items():\n"
        "    importlib.import_module(f'flows.stages.{stage}')\n    print(stage, sorted(unneeded & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    told = [
        line for line in done.stdout.splitlines() if line.startswith(tuple(unneeded))
    ]  # W&B says that it is offline
    assert told == [f"{stage} []" for stage in unneeded]


@pytest.mark.parametrize("program", ["-m", "-c"])
def test_garbage_is_not_collected_while_a_stage_is_imported(program: str) -> None:
    """`python -m` has "-m" in sys.argv while it looks for the stage's module. Other programs keep their collector."""
    code = (
        f"import gc, sys; sys.argv[0] = {program!r}; import flows.stages; before = gc.isenabled(); "
        "from flows.runtime.stage import spare_garbage_collection; spare_garbage_collection(); "
        "print(before, gc.isenabled(), gc.get_freeze_count() > 0, gc.get_threshold()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    expected = [str(program != "-m"), "True", "True", str(stage.OBJECTS_BETWEEN_COLLECTIONS)]
    assert done.stdout.split() == expected, done.stderr


def test_a_stages_objects_are_not_looked_at_again_when_it_ends(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, gc; atexit.register(lambda: print(len(gc.get_objects()) < 1000))"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "flows.stages.register"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_what_triton_has_made_is_collected_at_the_end() -> None:
    """Triton prints hundreds of lines about what is left of it; here a module of that name stands for it."""
    code = (
        "import gc, sys; from flows.runtime.stage import spare_garbage_collection, spare_last_collection; "
        "sys.modules['triton._C.libtriton'] = sys; spare_garbage_collection(); before = gc.get_freeze_count() > 0; "
        "spare_last_collection(); print(before, gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0"], done.stderr


@pytest.mark.faults("kill -9 of dvc, flow or stage")
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_stage_dies_with_its_parent(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    child = (
        "import os, time; from pathlib import Path; from flows.runtime.processes import die_with_parent; "
        "die_with_parent(); "
        f"Path({str(marker)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    try:
        wait_until(lambda: marker.exists() and marker.read_text() != "")
    finally:
        process.kill()
        process.wait()
    pid = int(marker.read_text())
    wait_until(lambda: not is_alive(pid))


@pytest.mark.faults("kill -9 of dvc, flow or stage")
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_stage_that_still_imports_dies_with_its_parent(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    (tmp_path / "transformers.py").write_text(
        f"import os, pathlib, time; pathlib.Path({str(marker)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'flows.stages.evaluate'])"
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths})
    try:
        wait_until(lambda: marker.exists() and marker.read_text() != "")
    finally:
        process.kill()
        process.wait()
    pid = int(marker.read_text())
    wait_until(lambda: not is_alive(pid))


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
