"""Sweeps: every combination is a trial, in threads, processes or on Ray."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from sweep_cases import worked

from flows.errors import StageError
from flows.scaling import sweep

long = pytest.mark.skipif("PEFTCORE_LONG" not in os.environ, reason="set PEFTCORE_LONG=1 to run it")


def run(project: Any, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "sweep", *arguments]
    return subprocess.run(
        command,
        cwd=project.root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(StageError, match=r"pip install 'peftcore\[scale\]'"):
        sweep._ray(1)


@pytest.mark.proof
def test_threads_map_the_grid_and_a_failed_trial_is_told(swept: Any) -> None:
    done = run(swept, "-S", "train.batch_size=4,3,2", "--jobs", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 3 trials failed" in done.stderr and "stage make failed" in done.stderr
    assert sorted(worked(swept)) == ["0.001 2", "0.001 4"]
    found = [record["validation_loss"] for record in json.loads((swept.root / "reports" / "sweep.json").read_text())]
    assert found == [pytest.approx(2.12), pytest.approx(2.14), None]
    (trials,) = json.loads(swept.paths.trials.read_text()).values()
    assert len(trials) == 2, "those that ran, for the versions to come on these data"


@pytest.mark.proof
def test_a_sweep_that_is_killed_has_counted_its_trials_and_leaves_no_process(swept: Any) -> None:
    make = swept.root / "make.py"
    waits = "if train['batch_size'] == 2:\n    import time; time.sleep(600)\nshutil.copytree"
    make.write_text(make.read_text().replace("shutil.copytree", waits, 1))
    swept.git("commit", "--quiet", "--all", "--message=The second trial waits")
    command = [sys.executable, "-m", "flows.cli", "sweep", "-S", "train.batch_size=4,2"]
    with subprocess.Popen(command, cwd=swept.root, stderr=subprocess.DEVNULL) as process:
        started = time.monotonic()
        try:
            while not swept.paths.trials.exists() and time.monotonic() < started + 300:
                time.sleep(0.5)
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()
    (trials,) = json.loads(swept.paths.trials.read_text()).values()
    assert len(trials) == 1
    assert psutil.wait_procs(children, timeout=30)[1] == []


@pytest.mark.proof
@pytest.mark.parametrize("runner", ["ray", pytest.param("process", marks=long)])
def test_processes_and_ray_find_what_threads_find(swept: Any, runner: str) -> None:
    if runner == "ray":
        pytest.importorskip("prefect_ray", reason="needs `pip install 'peftcore[scale]'`")
    done = run(swept, "-S", "train.learning_rate=0.001,0.002", "--runner", runner, "--jobs", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(done.stdout[done.stdout.index("[\n") :])
    assert records[0]["parameters"] == ["train.learning_rate=0.002"]
    assert sorted(worked(swept)) == ["0.001 8", "0.002 8"]
