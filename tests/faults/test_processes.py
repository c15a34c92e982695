"""Whatever ends DVC, the flow or a stage: nothing is left behind, nothing half-written is taken, a rerun is clean."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import PEFTCORE, done, eventually, left_in, started, told

MAKE = """\
import pathlib, shutil, signal, time
from flows.runtime.processes import die_with_parent
from flows.runtime.stage import exit_on_signal
die_with_parent()
signal.signal(signal.SIGTERM, exit_on_signal)
shutil.copytree("source/adapter", "artifacts/adapter")
pathlib.Path("half").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.02)
shutil.copytree("source", "artifacts", dirs_exist_ok=True)
"""
"""A stage that stays half done until it is told to go on."""
KILL = "kill -9 of dvc, flow or stage"
ENDED = {signal.SIGKILL: (KILL, -signal.SIGKILL), signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 143)}
"""{signal: (row, exit status)}"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")


@pytest.fixture
def root(project: Any) -> Path:
    (project.root / "make.py").write_text(MAKE)
    return project.root


def process_of(root: Path, *words: str) -> psutil.Process:
    return next(one for one in left_in(root) if set(words) <= set(one.cmdline()))


def wait_until_half_done(root: Path) -> None:
    assert eventually((root / "half").exists), told(root)


def assert_clean_rerun(root: Path, *command: str) -> None:
    assert eventually(lambda: not left_in(root)), [one.cmdline() for one in left_in(root)]
    (root / "go").touch()
    again = done(root, *PEFTCORE, *command)
    assert again.returncode == 0, again.stderr
    assert "Running stage 'make'" in again.stdout + again.stderr, "what was half done was taken for the whole"
    for file in (root / "source").rglob("*"):
        if file.is_file():
            assert (root / "artifacts" / file.relative_to(root / "source")).read_bytes() == file.read_bytes()
    assert not left_in(root)


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param("stage", marks=pytest.mark.slow),
        pytest.param("flow", marks=pytest.mark.slow),
        pytest.param("dvc", marks=pytest.mark.proof),
    ],
)
def test_kill_9_leaves_no_orphan_and_a_rerun_is_clean(root: Path, fault: Any, killed: str) -> None:
    words = {"flow": ("flows.cli",), "dvc": ("dvc", "repro"), "stage": ("make.py",)}[killed]
    with started(root, *PEFTCORE, "stage", "make") as command, fault(KILL):
        wait_until_half_done(root)
        process_of(root, *words).kill()
        assert command.wait(180) == (-signal.SIGKILL if killed == "flow" else 1)
        assert_clean_rerun(root, "stage", "make")


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_is_told_to_end_ends_and_a_rerun_is_clean(root: Path, fault: Any, number: signal.Signals) -> None:
    row, status = ENDED[number]
    with started(root, *PEFTCORE, "stage", "make") as command, fault(row):
        wait_until_half_done(root)
        end(command.pid, number)
        assert command.wait(180) == status
        assert_clean_rerun(root, "stage", "make")


def end(pid: int, number: signal.Signals) -> None:
    """As it comes: Ctrl-C to the terminal's whole group, the others to one process."""
    (os.killpg if number == signal.SIGINT else os.kill)(pid, number)


@pytest.mark.proof
@pytest.mark.parametrize("number", ENDED)
def test_a_flow_takes_prefects_server_with_it(root: Path, fault: Any, number: signal.Signals) -> None:
    row, status = ENDED[number]
    with started(root, *PEFTCORE, "run") as command, fault(row):
        wait_until_half_done(root)
        assert process_of(root, "uvicorn")
        end(command.pid, number)
        assert command.wait(60) == status, told(root)
        assert_clean_rerun(root, "stage", "make")
