"""The deployed pipeline in a work pool: two workers compete, one is killed, a run is cancelled, and none is lost."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.proof

LONG = "PEFTCORE_LONG" in os.environ
RUNS = 6 if LONG else 3
"""How many runs are asked for at once."""
AUTOMATIONS = Path(__file__).parents[3] / "deployment" / "automations.yaml"


@pytest.fixture
def pool(prefect: Any) -> Any:
    """The server with its two workers, started anew where a test has killed one."""
    for name in ("one", "two"):
        if prefect.processes[name].poll() is not None:
            prefect.start_worker(name)
    return prefect


def kill(pool: Any, worker: str, with_runs: bool) -> list[psutil.Process]:
    """Kill a worker, and all below it where `with_runs`, with SIGKILL; what was below it."""
    process = psutil.Process(pool.processes[worker].pid)
    below = process.children(recursive=True)
    for one in [process, *(below if with_runs else [])]:
        one.kill()
    pool.processes[worker].wait()
    return below


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_runs_take_turns_and_each_runs_once(pool: Any) -> None:
    runs = [pool.trigger() for _ in range(RUNS)]
    assert pool.ended(*runs, seconds=60 * RUNS) == ["COMPLETED"] * RUNS
    assert [pool.run(one)["run_count"] for one in runs] == [1] * RUNS
    noted = [(what, run) for what, run, *_ in pool.ledger()]
    # a start and an end of each, and never another's between the two
    for started, ended in zip(noted[::2], noted[1::2], strict=True):
        assert (started, ended) == (("start", started[1]), ("end", started[1]))
    assert sorted(run for what, run in noted if what == "start") == sorted(runs)
    print({run: pool.worker_of(run) for run in runs})


def test_a_run_ends_with_its_worker_and_the_other_worker_goes_on(pool: Any) -> None:
    first = pool.trigger(SLEEP="5")
    stage = pool.stage_of(first)
    worker = pool.worker_of(first)
    kill(pool, worker, with_runs=False)
    second = pool.trigger()
    # its output goes to the worker, so that it fails as soon as it says something, and frees its place
    assert pool.ended(first, second) == ["CRASHED", "COMPLETED"]
    assert pool.worker_of(second) != worker
    assert not is_alive(stage)
    assert pool.ledger(second)[0][3] > pool.ledger(first)[0][3] + 5


def test_trials_of_a_sweep_wait_for_a_place(pool: Any) -> None:
    before = len(pool.ledger())
    pool.command("gcl", "create", "gpu", "--limit", "1")
    for limit, status in (("gpu", 0), ("absent", 1)):
        command = [
            sys.executable,
            "-m",
            "flows.cli",
            "sweep",
            "-S",
            "+project.seed=1,2",
            "--jobs",
            "2",
            "--limit",
            limit,
        ]
        done = subprocess.run(
            command, cwd=pool.root, env=pool.environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == status, done.stdout + done.stderr
    assert "create the limit with `prefect gcl create absent --limit 1`" in done.stderr
    assert [what for what, *_ in pool.ledger()[before:]] == ["start", "end"] * 2


def test_a_cancelled_run_leaves_no_process(pool: Any) -> None:
    run = pool.trigger(SLEEP="600")
    stage = pool.stage_of(run)
    below = psutil.Process(pool.processes[pool.worker_of(run)].pid).children(recursive=True)
    assert stage in [process.pid for process in below]
    began = time.monotonic()
    pool.api("POST", f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    assert pool.ended(run) == ["CANCELLED"]
    gone, alive = psutil.wait_procs(below, timeout=30)
    print(f"cancelled within {time.monotonic() - began:.1f} s: {len(gone)} processes gone, {len(alive)} left")
    assert not alive


def test_a_stage_that_failed_is_tried_again_and_one_too_slow_is_stopped(pool: Any) -> None:
    again = pool.trigger(FAIL_ONCE="1", PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS="1")
    slow = pool.trigger({"stage_timeout": 2.0}, SLEEP="600", PREFECT_TASKS_DEFAULT_RETRIES="0")
    assert pool.ended(again, slow) == ["COMPLETED", "FAILED"]
    assert [what for what, *_ in pool.ledger(again)] == ["start", "start", "end"]
    assert "took longer than 2 seconds" in pool.run(slow)["state"]["message"]
    assert not is_alive(pool.stage_of(slow))


@pytest.mark.skipif(not LONG, reason="minutes, most of them waiting: set PEFTCORE_LONG=1 to run it")
def test_a_run_that_was_killed_with_its_worker_is_found_out_and_frees_its_place(pool: Any) -> None:
    pool.command("automation", "create", "--from-file", str(AUTOMATIONS))
    run = pool.trigger(SLEEP="600")
    stage = pool.stage_of(run)
    time.sleep(40)  # a first heartbeat comes after 30 seconds
    kill(pool, pool.worker_of(run), with_runs=True)
    began = time.monotonic()
    after = pool.trigger()
    assert pool.ended(run, seconds=200) == ["CRASHED"]
    print(f"found out within {time.monotonic() - began:.0f} s")
    assert pool.ended(after) == ["COMPLETED"]
    print(f"the next one is done within {time.monotonic() - began:.0f} s")
    assert not is_alive(stage)
