"""What `peftcore plan` predicts, beside what the train stage then takes: SmolLM2-135M on docstrings, several settings.

    python -m benchmarks.plan [--rows N] [--settings NAME ...] [--out FOLDER]      in a pipeline whose base is fetched

Both see N training rows, so that the batch which needs most memory is among those that are trained on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from benchmarks.machine import machine
from flows.params import load_params
from flows.paths import Paths
from flows.resources.estimate import estimate
from flows.resources.probe_launch import Probe
from flows.stages import prepare

MIB = 2**20
SETTINGS: dict[str, dict[str, Any]] = {
    "NF4, batch 8": {},
    "NF4, batch 2": {"train": {"batch_size": 2, "gradient_accumulation": 8}},
    "NF4, selective": {"train": {"gradient_checkpointing": "selective"}},
    "NF4, blocks": {"train": {"gradient_checkpointing": "blocks"}},
    "bf16, batch 8": {"quantization": {"storage": "none"}},
    "NF4, packed": {"train": {"batching": "packed", "pack_tokens": 512, "gradient_accumulation": 4}},
}
"""{name: what differs from the defaults}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=192, help="training rows (count)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="peftcore-plan-benchmark-") as folder:
        paths = Paths(Path(folder))
        paths.artifacts.mkdir()
        paths.base.symlink_to(Paths(Path.cwd()).base.resolve())
        for name in options.settings:
            found[name] = compare(SETTINGS[name], paths, options.rows)
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    text = report(found, options.rows)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "plan.md").write_text(text, encoding="utf-8")


def compare(setting: dict[str, dict[str, Any]], paths: Paths, rows: int) -> dict[str, Any]:
    """Plan one setting with and without the probe, then run it."""
    data = {"train_rows": rows, "validation_rows": max(8, rows // 4), "test_rows": 8}
    YAML().dump({"data": data, "tracking": {"mode": "disabled"}, **setting}, paths.params)
    params = load_params(paths.params)
    if not paths.data_report.exists():
        prepare.run(params, paths)
    counted, started = estimate(params, paths), time.perf_counter()
    with Probe() as probe:
        planned = estimate(params, paths, probe=probe)
    seconds = time.perf_counter() - started
    result = paths.root / "result.json"
    command = [sys.executable, "-m", "benchmarks.plan_side", str(result)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    subprocess.run(command, cwd=paths.root, env=environment, check=True, stdout=subprocess.DEVNULL)
    measured = json.loads(result.read_text(encoding="utf-8"))
    return {"planned": planned.as_dict(), "counted": counted.peak, "measured": measured, "planning": seconds}


def report(found: dict[str, dict[str, Any]], rows: int) -> str:
    """The figures as Markdown."""
    lines = [
        "# Planned and measured",
        "",
        f"SmolLM2-135M, LoRA of rank 16 on all linear layers, {rows} docstring rows, one epoch. Peak: MiB of resident",
        "memory of the train stage's process. Time: seconds of the stage without its imports; what the processor spent",
        "on it stands beside, because a plan cannot know what else a machine will do. Planning: seconds of the plan",
        "itself, without the imports of the first process.",
        "",
        f"{machine()}. `python -m benchmarks.plan --rows {rows}`",
        "",
        "| | peak: counted only | planned | measured | ratio | time: planned | measured | processor | ratio to it | "
        "planning |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        planned, measured = one["planned"], one["measured"]
        seconds = planned["seconds"] - planned["time"]["libraries"]
        computed = measured["cpu_seconds"] / torch.get_num_threads()
        lines.append(
            f"| {name} | {one['counted'] / MIB:,.0f} | {planned['peak'] / MIB:,.0f} | {measured['peak'] / MIB:,.0f} | "
            f"{planned['peak'] / measured['peak']:.2f} | {seconds:,.0f} | {measured['seconds']:,.0f} | "
            f"{computed:,.0f} | {seconds / computed:.2f} | {one['planning']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
