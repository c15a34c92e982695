"""train in two processes: it writes what one writes, and goes on where it was after one of them was killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from flows.params import Params
from flows.paths import Paths
from flows.stages import train
from peftcore.train.checkpoints import checkpoints_in, step_of

ROOT = Path(__file__).parents[3]
SECONDS = 300
"""In which a run must end, however busy the machine."""
EXACT = {"storage": "none", "compute_dtype": "float32"}
"""Of the base, so that an order of sums does not show."""


def start(paths: Paths, params: Params) -> "subprocess.Popen[str]":
    paths.params.write_text(params.model_dump_json())  # JSON is YAML
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "flows.stages.train"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=paths.root, env=environment, stdout=pipe, stderr=pipe, text=True)


def processes_of(stage: "subprocess.Popen[str]") -> dict[int, psutil.Process]:
    """The stage's training processes by rank."""
    children = psutil.Process(stage.pid).children(recursive=True)
    return {int(rank): child for child in children if (rank := child.environ().get("RANK")) is not None}


def wait_for(comes: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not comes() and time.monotonic() < deadline:
        time.sleep(0.01)


def log_of(paths: Paths) -> list[dict[str, Any]]:
    return [json.loads(line) for line in paths.training_log.read_text().splitlines()]


def adapter(paths: Paths) -> dict[str, torch.Tensor]:
    return load_file(paths.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "launcher", [pytest.param("accelerate", marks=pytest.mark.slow), pytest.param("torchrun", marks=pytest.mark.proof)]
)
def test_two_processes_write_what_one_writes(
    prepared: Paths, tiny_params: Callable[..., Params], launcher: str
) -> None:
    shared: dict[str, Any] = {"method": {"r": 4, "lora_dropout": 0.0}, "quantization": EXACT}
    train.run(tiny_params(train={"batch_size": 2, "gradient_accumulation": 2}, **shared), prepared)
    alone, records, summary = adapter(prepared), log_of(prepared), json.loads(prepared.training_summary.read_text())
    stage = start(prepared, tiny_params(train={"batch_size": 2, "processes": 2, "launcher": launcher}, **shared))
    shown, said = stage.communicate(timeout=SECONDS)
    assert stage.returncode == 0, said
    assert not shown.replace("[INFO] Running in WANDB offline mode", "").strip()  # transformers says so on import
    assert "rank" not in said and said.count("train: 100%") == 1
    found = adapter(prepared)
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    steps = [(record["step"], record["loss"] is None) for record in records]
    assert [(record["step"], record["loss"] is None) for record in log_of(prepared)] == steps
    for one, two in zip(records, log_of(prepared), strict=True):
        for name in ("loss", "validation_loss", "learning_rate"):
            assert two[name] == pytest.approx(one[name], abs=1e-4) if one[name] is not None else two[name] is None
    written = json.loads(prepared.training_summary.read_text())
    assert {name: written[name] for name in ("steps", "tokens", "best_step")} == {
        name: summary[name] for name in ("steps", "tokens", "best_step")
    }
    assert list(prepared.checkpoints.iterdir()) == []


def kill_one(paths: Paths, params: Params, rank: int) -> str:
    """Kill one process of a run after its step 12; what the stage said as it ended."""

    def has_checkpoint() -> bool:  # of step 12, or of a later step, which replaces it
        folders = [folder for run in paths.checkpoints.glob("*") for folder in checkpoints_in(run)]
        return any(step_of(folder) >= 12 and (folder / "SHA256SUMS").exists() for folder in folders)

    stage = start(paths, params)
    wait_for(has_checkpoint)
    running = processes_of(stage)
    assert len(running) == 2
    running[rank].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, said = stage.communicate(timeout=SECONDS)
    assert time.monotonic() - began < 60
    assert stage.returncode == 1
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in running.values())
    *_, message = said.strip().splitlines()
    assert message.startswith(f"error: process {rank} of 2 (pid {running[rank].pid}) was killed by SIGKILL")
    assert "Run it again: training resumes from the last complete checkpoint" in message
    return said


LONG = {"batch_size": 2, "processes": 2, "epochs": 8.0, "evaluations": 16}


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_one_message(prepared: Paths, tiny_params: Callable[..., Params]) -> None:
    said = kill_one(prepared, tiny_params(train={**LONG, "launcher": "torchrun"}, quantization=EXACT), 1)
    assert "Traceback" not in said and said.count("error: ") == 1


@pytest.mark.proof
@pytest.mark.faults("kill -9 of training")
def test_a_run_of_accelerate_says_which_process_was_killed_and_goes_on(
    prepared: Paths, tiny_params: Callable[..., Params]
) -> None:
    params = tiny_params(train=LONG, quantization=EXACT)
    straight = start(prepared, params)
    _, said = straight.communicate(timeout=SECONDS)
    assert straight.returncode == 0, said
    whole, records = adapter(prepared), [(r["step"], r["loss"], r["validation_loss"]) for r in log_of(prepared)]
    said = kill_one(prepared, params, 0)
    assert "Traceback" not in said and said.count("error: ") == 1
    again = start(prepared, params)
    _, said = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, said
    began = re.search(r"train: +\d+%, (\d+) of 64 steps", said)
    assert began is not None and int(began[1]) >= 8  # the checkpoint of 12 may have been half written
    assert said.count(f"flows.train: resuming from step {began[1]} of 64") == 1
    assert [(r["step"], r["loss"], r["validation_loss"]) for r in log_of(prepared)] == records
    for name, tensor in whole.items():
        assert torch.equal(adapter(prepared)[name], tensor)


@pytest.mark.slow
@pytest.mark.faults("kill -9 of dvc, flow or stage")
def test_no_process_outlives_the_stage_that_was_killed(prepared: Paths, tiny_params: Callable[..., Params]) -> None:
    stage = start(prepared, tiny_params(train={"processes": 2, "epochs": 200.0}, quantization=EXACT))
    wait_for(lambda: any(log.read_text() for log in prepared.checkpoints.glob("*/log.jsonl")))  # they train
    running = processes_of(stage)
    stage.send_signal(signal.SIGKILL)
    stage.communicate(timeout=SECONDS)
    _, alive = psutil.wait_procs(running.values(), timeout=30)
    assert running and not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_what_a_process_refuses_is_said_once(prepared: Paths, tiny_params: Callable[..., Params]) -> None:
    (prepared.base / "model.safetensors").write_bytes(b"cut")
    stage = start(prepared, tiny_params(train={"processes": 2}))
    _, said = stage.communicate(timeout=SECONDS)
    assert stage.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "model.safetensors" in errors[0] and "Traceback" not in said
