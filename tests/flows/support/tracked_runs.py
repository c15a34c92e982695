"""Writes runs as the pipeline tracks them, in a process of its own: `python tracked_runs.py FOLDER MODE [killed]`.

One training run for each of three learning rates, each with its evaluation; "killed": one that dies by SIGKILL while
it logs, once W&B has written enough of it to the disk.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flows.runtime.tracking import Tracker

RATES = {"slow": 2e-4, "right": 5e-4, "fast": 2e-3}
LOSSES = {"slow": 2.9, "right": 2.5, "fast": 2.7}
PROMPT, REFERENCE = "def greet(): ...", "Say <hello> & wave."
STEPS = 20


def write_runs(folder: Path, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> int:
    """Run this file in a process of its own, with no settings of W&B's but these; returns its exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(folder), *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    everything = {**kept, "WANDB_ERROR_REPORTING": "false", **environment}
    return subprocess.run(command, env=everything, check=False, capture_output=True, timeout=120).returncode


def write(folder: Path, mode: Any) -> None:
    adapter = folder / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    for name, rate in RATES.items():
        config = {"train": {"learning_rate": rate, "batch_size": 8}, "method": {"name": "lora"}}
        tracker = Tracker("docs", mode, config, folder, name=name)
        identity = tracker.run_id
        for step in range(1, STEPS + 1):
            loss = LOSSES[name] + math.exp(-step / 4)
            tracker.log({"step": step, "loss": loss, "validation_loss": None, "learning_rate": rate})
        tracker.log({"step": STEPS, "loss": None, "validation_loss": LOSSES[name] + 0.01})
        tracker.finish({"steps": STEPS, "best_validation_loss": LOSSES[name] + 0.01}, adapter)
        evaluation = Tracker("docs", mode, config, folder, evaluates=identity, name=f"docstrings {name}")
        answer = f"<script>alert('{name}')</script>"
        sample = {"prompt": PROMPT, "reference": REFERENCE, "base": "Well, this", "adapter": answer}
        evaluation.table("samples", [sample])
        registry = {"version": f"v0.1.{list(RATES).index(name)}", "tag": "docstrings@v0.1.0"}
        evaluation.finish({"adapter": {"loss": LOSSES[name]}, "registry": registry})
        print(identity)


def write_until_killed(folder: Path) -> None:
    tracker = Tracker("docs", "offline", {"train": {"learning_rate": 1e-3}}, folder, name="killed")
    step = 0
    while not any(path.stat().st_size > 64_000 for path in folder.glob("wandb/*run-*/*.wandb")):
        step += 1
        tracker.log({"step": step, "loss": 1 / step})
        if step % 200 == 0:
            time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[3:] == ["killed"]:
        write_until_killed(Path(sys.argv[1]))
    else:
        write(Path(sys.argv[1]), sys.argv[2])
