"""A stage as a subprocess: whatever kills its parents, it is not left behind, and the next run is clean."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import eventually, is_gone

from flows.errors import BusyError, StageError, StageStopped
from flows.runtime import stage_process
from flows.runtime.processes import this_host
from flows.runtime.project import dvc
from flows.runtime.stage_process import SECONDS_TO_NOTICE, SECONDS_TO_STOP, forget_dead_locks, run_stage

STAGE = """\
import os, pathlib, time
from flows.runtime.processes import die_with_parent
die_with_parent()
pathlib.Path("stage.pid").write_text(str(os.getpid()))
while not pathlib.Path("go").exists():
    time.sleep(0.05)
pathlib.Path("out.txt").write_text("whole")
"""
DRIVER = """\
from pathlib import Path
from flows.runtime.stage_process import run_stage
run_stage(Path.cwd(), "wait", 60)
"""


@pytest.fixture(params=["/bin/sh", pytest.param("/bin/bash", marks=pytest.mark.slow)])
def shell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell that DVC starts commands with; bash gives its place to a lone command by itself, dash does not."""
    if not Path(request.param).exists():
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("SHELL", request.param)


@pytest.fixture
def root(project: Any) -> Path:
    (project.root / "dvc.yaml").write_text("stages: {wait: {cmd: exec python wait.py, outs: [out.txt]}}\n")
    (project.root / "wait.py").write_text(STAGE)
    return project.root


def _heed_interrupts() -> None:
    # a test run that a shell put into the background ignores them, and its children would too
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def driver(shell: None, root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for the stage, in a process group of its own, as a terminal gives it."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=root, start_new_session=True, preexec_fn=_heed_interrupts
    ) as process:
        yield process
        process.kill()


def stage_pid(root: Path) -> int:
    path = root / "stage.pid"
    assert eventually(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def test_a_stage_runs_once_and_again_only_by_force(root: Path) -> None:
    (root / "go").touch()
    run_stage(root, "wait", 60)
    (root / "stage.pid").unlink()
    run_stage(root, "wait", 60)
    assert not (root / "stage.pid").exists()
    run_stage(root, "wait", 60, force=True)
    assert (root / "stage.pid").exists()


def test_a_stage_keeps_the_memory_that_it_frees_unless_the_user_says_otherwise(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "dvc.yaml").write_text("stages: {wait: {cmd: env > out.txt, outs: [out.txt]}}\n")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "99")
    run_stage(root, "wait", 60)
    lines = (root / "out.txt").read_text().splitlines()
    assert "MALLOC_MMAP_MAX_=0" in lines
    assert "MALLOC_TRIM_THRESHOLD_=99" in lines


def test_a_dvc_that_is_killed_is_named(root: Path) -> None:
    (root / "wait.py").write_text("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n")
    with pytest.raises(StageError, match=r"^stage wait: DVC was killed \(Killed\); run it again to continue$"):
        run_stage(root, "wait", 60)


def test_a_failing_stage_is_named(root: Path) -> None:
    (root / "wait.py").write_text("raise SystemExit(3)")
    with pytest.raises(StageError, match="stage wait failed"):
        run_stage(root, "wait", 60)


def test_a_stage_without_its_inputs_names_the_stage_that_writes_them(root: Path) -> None:
    (root / "dvc.yaml").write_text(
        "stages:\n"
        "  first: {cmd: exec python wait.py, outs: [{out.txt: {cache: false}}]}\n"
        "  second: {cmd: exec python wait.py, deps: [out.txt, wait.py]}\n"
    )
    with pytest.raises(StageError, match=r"stage second failed.* out\.txt is missing, which stage first writes: run"):
        run_stage(root, "second", 60)


LOSING_DVC = """\
import pathlib, sys
from dvc.cli import main
status = main(sys.argv[1:])
(stored,) = pathlib.Path(".dvc/cache").rglob("*9d65622d0e4e1c12e96c5edcd4c3")
stored.unlink()
sys.exit(status)
"""
"""DVC that exits with 0 though its cache lacks the file of an output's folder, as on a full disk."""


def test_a_stage_whose_outputs_dvc_did_not_store_has_failed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "dvc.yaml").write_text("stages: {wait: {cmd: mkdir out && echo whole > out/file, outs: [out]}}\n")
    monkeypatch.setattr(stage_process, "DVC", (sys.executable, "-c", LOSING_DVC))
    with pytest.raises(StageError, match=r"stage wait: DVC did not store out in its cache.*`dvc commit --force wait`"):
        run_stage(root, "wait", 60)
    monkeypatch.undo()
    dvc(root, "commit", "--force", "wait")
    written = (root / "out" / "file").stat().st_mtime_ns
    run_stage(root, "wait", 60)
    assert (root / "out" / "file").stat().st_mtime_ns == written, "it did not run again"


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.usefixtures("shell")
def test_a_stage_that_takes_too_long_is_stopped_with_all_below_it(root: Path) -> None:
    for seconds in (2, 8, 32, 128):  # a busy machine may take longer than that to start it
        with pytest.raises(StageError, match=rf"wait took longer than {seconds} seconds.*--stage-timeout"):
            run_stage(root, "wait", seconds)
        if (root / "stage.pid").exists():
            break
    assert eventually(lambda: is_gone(stage_pid(root)))


@pytest.mark.faults("kill -9 of dvc, flow or stage")
@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_kill_9_of_the_parent_leaves_no_orphan_and_a_rerun_is_clean(
    root: Path, driver: subprocess.Popen[bytes]
) -> None:
    pid = stage_pid(root)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert eventually(lambda: is_gone(pid))
    (root / "go").touch()
    run_stage(root, "wait", 60)
    assert (root / "out.txt").read_text() == "whole"
    assert dvc(root, "status", "--json").strip() == "{}"


@pytest.mark.faults("Ctrl-C")
def test_ctrl_c_stops_the_stage_and_a_rerun_is_clean(root: Path, driver: subprocess.Popen[bytes]) -> None:
    pid = stage_pid(root)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to all of its foreground group
    assert driver.wait(SECONDS_TO_STOP + 30) != 0  # DVC itself may hang at its end, and is killed then
    assert eventually(lambda: is_gone(pid))
    (root / "go").touch()
    run_stage(root, "wait", 60)
    assert (root / "out.txt").read_text() == "whole"


@pytest.mark.faults("Ctrl-C")
def test_an_interrupt_of_the_run_alone_stops_the_stage_too(root: Path, driver: subprocess.Popen[bytes]) -> None:
    pid = stage_pid(root)
    began = time.monotonic()
    os.kill(driver.pid, signal.SIGINT)
    assert eventually(lambda: is_gone(pid), SECONDS_TO_STOP)
    assert time.monotonic() - began > SECONDS_TO_NOTICE
    assert driver.wait(SECONDS_TO_STOP + 30) != 0
    assert not (root / "out.txt").exists()


def test_files_in_use_by_the_living_stay_so_and_those_of_a_zombie_do_not(
    root: Path, request: pytest.FixtureRequest
) -> None:
    path = root / ".dvc" / "tmp" / "rwlock"
    zombie = subprocess.Popen(["true"])
    request.addfinalizer(zombie.wait)
    assert eventually(lambda: is_gone(zombie.pid))  # dead, but not waited for yet
    dead, alive = ({"pid": pid, "cmd": "dvc repro"} for pid in (zombie.pid, os.getpid()))
    path.write_text(json.dumps({"write": {"a": dead}, "read": {"b": [alive]}}))
    forget_dead_locks(root)
    assert path.exists()
    path.write_text(json.dumps({"write": {"a": dead}, "read": {"b": [dead]}}))
    forget_dead_locks(root)
    assert not path.exists()


def test_the_note_of_another_host_on_a_shared_disk_is_not_judged_by_processes_here(root: Path) -> None:
    """The other host's process is unknown here, so DVC's note of it would be taken for that of a killed one."""
    folder = root / ".dvc" / "tmp"
    note = json.dumps({"write": {"a": {"pid": 2**22 + 1, "cmd": "dvc repro"}}, "read": {}})
    (folder / "rwlock").write_text(note)
    lock = folder / "peftcore.lock"
    lock.write_text("far/12345678\n")
    with lock.open() as theirs:
        fcntl.flock(theirs, fcntl.LOCK_SH)
        with pytest.raises(BusyError, match=r"far/12345678 is working in .*; wait for it, or work in a clone"):
            run_stage(root, "wait", 60)
        assert (folder / "rwlock").read_text() == note
    (root / "go").touch()
    run_stage(root, "wait", 60)  # the lock went with the process that held it
    assert (root / "out.txt").read_text() == "whole" and lock.read_text() == f"{this_host()}\n"


def test_a_host_that_takes_the_lock_while_it_becomes_a_shared_one_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, lock = fcntl.flock, root / ".dvc" / "tmp" / "peftcore.lock"

    def in_two_steps(file: Any, how: int) -> None:
        if how == fcntl.LOCK_SH:
            flock(file, fcntl.LOCK_UN)
            lock.write_text("far/12345678\n")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", in_two_steps)
    with pytest.raises(BusyError, match=r"far/12345678 is working in"):
        run_stage(root, "wait", 60)


def test_a_stage_is_stopped_as_soon_as_it_should_be(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.runtime.stage_process.SECONDS_BETWEEN_LOOKS", 0.05)
    pid = root / "stage.pid"
    with pytest.raises(StageStopped, match="stage wait was stopped before its end"):
        run_stage(root, "wait", 120, should_stop=lambda: pid.exists() and pid.read_text() != "")
    until = time.monotonic() + 20
    while Path(f"/proc/{pid.read_text()}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid.read_text()}").exists() and not (root / "out.txt").exists()
    (root / "go").touch()
    run_stage(root, "wait", 120, should_stop=lambda: False)
    assert (root / "out.txt").read_text() == "whole"
