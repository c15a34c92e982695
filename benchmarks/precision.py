"""SmolLM2-135M on docstring rows with its frozen base in float32, bfloat16, float16 and NF4: loss, memory, time.

    python -m benchmarks.precision              # results/precision.md, .json and .png
    python -m benchmarks.precision --steps 20 --only "bf16/fp16" --folder /tmp/some
    python -m benchmarks.precision --draw       # table and picture again from the last figures

Each precision trains in a process of its own, from the same base, the same start adapter (LoRA, r = 16, alpha = 32 on
all linear layers, in float32), on the same batches in the same order. float16 has its losses scaled dynamically.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.precision_picture import draw
from benchmarks.precision_side import PRECISIONS, Task

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    figures = options.folder / "precision.json"
    if not options.draw:
        measure(options, figures)
    measured = json.loads(figures.read_text(encoding="utf-8"))
    (options.folder / "precision.md").write_text(table(measured), encoding="utf-8")
    draw(measured, options.folder / "precision.png")
    print(table(measured))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.precision", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split("/"), default=list(PRECISIONS), help="as bf16/fp16")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--held-out", type=int, default=48, help="validation rows judged at the end")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder")
    parser.add_argument("--data", type=Path, default=Path("artifacts/data"), help="folder of the prepared splits")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--draw", action="store_true", help="draw the last run's figures again; train nothing")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PRECISIONS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {'/'.join(PRECISIONS)}")
    for path in (options.base / "config.json", options.data / "train.parquet"):
        if not options.draw and not path.exists():
            parser.error(f"there is no {path}; run the pipeline's fetch and prepare stages first")
    return options


def measure(options: argparse.Namespace, figures: Path) -> None:
    """Train in each precision, one after the other; what was measured before with the same settings stays."""
    measured: dict[str, Any] = {
        "machine": machine(),
        "settings": {"steps": options.steps, "batch": options.batch, "learning_rate": options.learning_rate},
        "memory": "GPU allocator" if torch.cuda.is_available() else "resident memory of the process",
    }
    before = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    sides = {side["precision"]: side for side in before.get("sides", ()) if before["settings"] == measured["settings"]}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            task, result = Path(folder) / "task.json", Path(folder) / "result.json"
            settings = {
                name: getattr(options, name) for name in ("steps", "batch", "learning_rate", "held_out", "seed")
            }
            given = Task(precision=name, base=str(options.base), data=str(options.data), output=folder, **settings)
            task.write_text(json.dumps(asdict(given)), encoding="utf-8")
            subprocess.run([sys.executable, "-m", "benchmarks.precision_side", str(task), str(result)], check=True)
            sides[name] = json.loads(result.read_text(encoding="utf-8"))
        measured["sides"] = [sides[precision] for precision in PRECISIONS if precision in sides]
        figures.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def table(measured: dict[str, Any]) -> str:
    """Markdown; differences are against the first row."""
    settings, sides = measured["settings"], measured["sides"]
    lines = [
        f"{settings['steps']} steps of {settings['batch']} docstring rows, the same for all; losses in nats a "
        f"supervised token, memory in MiB ({measured['memory']}), seconds the median of a step.",
        "",
        "| base | held-out loss | mean training loss | largest difference of a step's loss | seconds a step "
        "| of the first | peak memory | of it before the first step | skipped steps | loss scale at the end |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first = sides[0]
    for side in sides:
        apart = max(abs(a - b) for a, b in zip(side["losses"], first["losses"], strict=True))
        seconds = statistics.median(side["seconds"])
        scale = "" if side["loss_scale"] is None else f"{side['loss_scale']:,.0f}"
        lines.append(
            f"| {side['precision']} | {side['held_out_loss']:.4f} | {statistics.mean(side['losses']):.4f} "
            f"| {apart:.4f} | {seconds:.2f} | {seconds / statistics.median(first['seconds']):.2f} "
            f"| {side['peak_memory'] / MIB:,.0f} | {side['loaded_memory'] / MIB:,.0f} | {side['skipped_steps']} "
            f"| {scale} |"
        )
    return "\n".join([*lines, "", f"Measured on {measured['machine']}."]) + "\n"


if __name__ == "__main__":
    main()
