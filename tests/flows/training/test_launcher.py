"""Launching: which process's failure is told, and what each process gets of the machine."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flows.errors import StageError
from flows.params import Params
from flows.training import launcher
from flows.training.launcher import joined, launch


@pytest.fixture
def fail_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let processes end: `fail_with({rank: (status, what it said or None, whether it lost another)})`."""

    def arm(ends: dict[int, tuple[int, str | None, bool]]) -> None:
        failures = {}
        for rank, (status, said, lost) in ends.items():
            file = tmp_path / f"{rank}.json"
            if said is not None:
                extra = {"timestamp": str(int(time.time())), "lost": lost}
                file.write_text(json.dumps({"message": {"message": said, "extraInfo": extra}}))
            failures[rank] = ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=status, error_file=str(file))

        def start(*_: Any) -> None:
            raise ChildFailedError("stage", failures)

        monkeypatch.setitem(launcher._LAUNCHERS, "torchrun", start)

    return arm


LOST = (1, "a process lost another", True)
NAN = (1, "the loss is nan", False)
SECOND = r"process 1 of 2 \(pid 101\) "


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        # the one that was killed, not those that lost it or were stopped because of it
        (
            {0: LOST, 1: (-9, None, False)},
            SECOND + "was killed by SIGKILL",
        ),
        ({0: (-15, None, False), 1: (-11, None, False)}, SECOND + "was killed by SIGSEGV"),
        ({0: LOST, 1: NAN}, "^the loss is nan$"),
        ({0: NAN, 1: NAN}, "^the loss is nan$"),
        (
            {0: LOST, 1: (1, None, False)},
            SECOND + "ended with status 1",
        ),
        ({0: (143, None, False), 1: (1, "no space", False)}, "^no space$"),
    ],
)
def test_the_process_that_failed_first_is_told(fail_with: Callable[..., None], ends: dict[int, Any], told: str) -> None:
    fail_with(ends)
    with pytest.raises(StageError, match=told):
        launch("flows.stages.train", 2, "torchrun")


@pytest.mark.parametrize(("given", "threads"), [(None, "2"), ("3", "3")])
def test_processes_share_the_cores_unless_the_threads_are_given(
    monkeypatch: pytest.MonkeyPatch, given: str | None, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    seen: list[str] = []
    monkeypatch.setitem(launcher._LAUNCHERS, "torchrun", lambda *_: seen.append(os.environ["OMP_NUM_THREADS"]))
    launch("flows.stages.train", 2, "torchrun")
    assert seen == [threads]
    assert os.environ.get("OMP_NUM_THREADS") == given  # the stage's own environment is as it was


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StageError, match=r"train\.processes is 2, and this machine has 1 GPUs: give at most"):
        launch("flows.stages.train", 2, "torchrun")


def test_interrupting_the_launcher_interrupts_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise launcher.SignalException("", signal.SIGINT)

    monkeypatch.setitem(launcher._LAUNCHERS, "torchrun", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch("flows.stages.train", 2, "torchrun")


def test_alone_a_process_is_the_main_one() -> None:
    with joined(1) as processes:
        assert processes.is_main_process and processes.num_processes == 1


def test_a_group_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    PartialState._reset_state()
    with pytest.raises(SystemExit), joined(2):
        pytest.fail("a group of one is none of two")
    said = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert said == "the launcher started 1 processes, but train.processes * train.nodes is 2; make both equal"


def test_a_process_that_is_stopped_while_it_says_why_leaves_nothing_half_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent reads the file as JSON whatever it holds, and half of it hid which process had been killed."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("os.fsync", lambda _: sys.exit(143))
    with pytest.raises(SystemExit):
        launcher._leave("a process lost another", lost=True)
    assert list(tmp_path.iterdir()) == []


def test_every_launcher_of_the_parameters_can_start() -> None:
    offered = Params.model_json_schema()["$defs"]["Train"]["properties"]["launcher"]["enum"]
    assert set(offered) == set(launcher._LAUNCHERS)
