"""The docstring epoch of SmolLM2-135M-Instruct: ours against TRL's SFTTrainer on HF PEFT, each in its own process.

    python -m benchmarks.epoch --mode same                              # the same batches in the same order
    python -m benchmarks.epoch --mode default --rows 320 --batch 16     # each as it does it by default
    python -m benchmarks.epoch --draw                                   # table and picture from the last figures

Rows are those of the pipeline's prepare stage. LoRA, r = 16, alpha = 32 on all linear layers, from the same start
weights; the base in bf16. Only `train()` is timed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import peftcore
from benchmarks.epoch_picture import draw
from benchmarks.epoch_side import OURS, TRL, TRL_NO_CHECKPOINTING, Result, Task
from benchmarks.machine import machine
from flows.base.model import EAGER_UP_TO
from peftcore.train import LengthGroupedSampler

RESULTS = Path(__file__).parent / "results"
SIDES = {"same": [OURS, TRL], "default": [OURS, TRL, TRL_NO_CHECKPOINTING]}
BATCHES = {"same": (8, 2), "default": (16, 1)}
"""Rows of a forward pass and forward passes of a step."""
TARGETS = {"same": 0.45, "default": 0.16}
"""Largest ratio of our time to TRL's."""
LOSS_TOLERANCE = 0.01
"""Largest relative difference of the losses on the same batches."""
MIB = 2**20
WHAT = {"same": "the same batches in the same order", "default": "each as it does it by default"}


def main() -> None:
    options = parse()
    figures = options.folder / "epoch.json"
    modes: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    if not options.draw:
        modes[options.mode] = measure(options)
        options.folder.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(modes, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(table(mode, modes[mode]) for mode in SIDES if mode in modes)
    (options.folder / "epoch.md").write_text(text, encoding="utf-8")
    draw({mode: modes[mode] for mode in SIDES if mode in modes}, options.folder / "epoch.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.epoch", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--mode", choices=SIDES, default="same")
    parser.add_argument("--rows", type=int, help="training rows (default: all)")
    parser.add_argument("--batch", type=int, help="rows of a forward pass (default: 8 for same, 16 for default)")
    parser.add_argument(
        "--accumulation", type=int, help="forward passes of a step (default: 2 for same, 1 for default)"
    )
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--order", choices=("grouped", "file"), default="grouped", help="of the rows, in same")
    parser.add_argument(
        "--attention", choices=("sdpa", "eager"), help="of all (default: eager for short rows, TRL's own in default)"
    )
    parser.add_argument("--autocast", choices=("on", "off"), help="TRL's (default: on, as TRL has it)")
    parser.add_argument("--sides", type=lambda text: text.split("/"), help="in the order to run them, as ours/TRL")
    parser.add_argument("--repeats", type=int, default=1, help="times that all sides are run in turn")
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder")
    parser.add_argument("--data", type=Path, default=Path("artifacts/data"), help="folder of the prepared splits")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--draw", action="store_true", help="write table and picture again; train nothing")
    options = parser.parse_args()
    options.sides = options.sides or SIDES[options.mode]
    if unknown := set(options.sides) - set(SIDES["default"]):
        parser.error(f"--sides: there is no {', '.join(sorted(unknown))}; there are {'/'.join(SIDES['default'])}")
    if options.draw and not (options.folder / "epoch.json").exists():
        parser.error(f"--draw: there is no epoch.json in {options.folder}; run without it first")
    if not options.draw:
        if set(options.sides) != {OURS} and importlib.util.find_spec("trl") is None:
            parser.error("TRL is not installed; pip install -e .[dev], or give --sides ours")
        for path in (options.base / "config.json", options.data / "train.parquet"):
            if not path.exists():
                parser.error(f"there is no {path}; run the pipeline's fetch and prepare stages first")
    batch, accumulation = BATCHES[options.mode]
    options.batch = options.batch or batch
    options.accumulation = options.accumulation or accumulation
    return options


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every side --repeats times in turn, each in a process of its own."""
    runs: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        save_start(options, scratch / "start")
        longest = order_rows(options, scratch / "train.parquet")
        tasks = [task_of(side, longest, options, scratch) for side in options.sides]
        for repeat in range(options.repeats):
            for task in tasks:
                runs.append(run(task, scratch))
                print(
                    f"{repeat + 1}/{options.repeats} {task.side}: {runs[-1].seconds:.1f} s, {runs[-1].steps} steps, "
                    f"held-out loss {runs[-1].held_out_loss:.4f}",
                    file=sys.stderr,
                    flush=True,
                )
    check(runs, same=options.mode == "same")
    names = ["transformers", *(("peft", "trl") if set(options.sides) != {OURS} else ())]
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return {
        "settings": {
            "rows": parquet.read_metadata(options.data / "train.parquet").num_rows
            if options.rows is None
            else options.rows,
            "order": options.order,
            "dropout": options.dropout,
            "repeats": options.repeats,
            "sides": [settings_of(task) for task in tasks],
        },
        "sides": [summary([run for run in runs if run.side == side]) for side in options.sides],
        "machine": f"{machine()}, {packages}",
    }


def save_start(options: argparse.Namespace, folder: Path) -> None:
    """The adapter that every run starts from."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16, local_files_only=True)
    config = peftcore.LoraConfig(
        task_type=peftcore.TaskType.CAUSAL_LM,
        r=16,
        lora_alpha=32,
        lora_dropout=options.dropout,
        target_modules="all-linear",
    )
    peftcore.get_peft_model(model, config).save_pretrained(folder)


def order_rows(options: argparse.Namespace, path: Path) -> int:
    """Write the training rows as they are to be seen; returns the tokens of the longest.

    In `default` each trainer orders them itself.
    """
    rows = parquet.read_table(options.data / "train.parquet").slice(0, options.rows)
    lengths = [len(ids) for ids in rows["input_ids"].to_pylist()]
    if options.mode == "same" and options.order == "grouped":
        rows = rows.take(list(LengthGroupedSampler(lengths, options.batch, seed=42)))
    parquet.write_table(rows, path)
    return max(lengths)


def task_of(side: str, longest: int, options: argparse.Namespace, scratch: Path) -> Task:
    same = options.mode == "same"
    attention = options.attention or ("eager" if (same or side == OURS) and longest <= EAGER_UP_TO else "sdpa")
    return Task(
        side=side,
        same=same,
        base=str(options.base),
        start=str(scratch / "start"),
        train=str(scratch / "train.parquet"),
        validation=str(options.data / "validation.parquet"),
        rows=options.rows,
        batch=options.batch,
        accumulation=options.accumulation,
        learning_rate=options.learning_rate,
        attention=attention,
        autocast=side != OURS and options.autocast != "off",
        checkpointing=side == TRL and not same,
        seed=42,
        output=str(scratch / "run"),
    )


def run(task: Task, scratch: Path) -> Result:
    """One training in its own process."""
    asked, answered = scratch / "task.json", scratch / "result.json"
    asked.write_text(json.dumps(asdict(task)), encoding="utf-8")
    answered.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "benchmarks.epoch_side", str(asked), str(answered)])
    if done.returncode or not answered.exists():
        raise SystemExit(f"error: {task.side} ended with status {done.returncode}; its message is above")
    return Result(**json.loads(answered.read_text(encoding="utf-8")))


def check(runs: list[Result], same: bool) -> None:
    """Stop unless all started from the same weights and, in `same`, saw the same batches."""
    first = runs[0]
    for other in runs[1:]:
        if other.trainable != first.trainable or abs(other.start_norm / first.start_norm - 1) > 1e-6:
            raise SystemExit(f"error: {other.side} started from other weights than {first.side}")
        if same and other.batches != first.batches:
            raise SystemExit(f"error: {other.side} saw other batches than {first.side}")
        if other.tokens != first.tokens:
            raise SystemExit(f"error: {other.side} saw {other.tokens} tokens and {first.side} {first.tokens}")


def settings_of(task: Task) -> dict[str, Any]:
    left_out = ("base", "start", "train", "validation", "output", "rows")
    return {name: value for name, value in asdict(task).items() if name not in left_out}


def summary(runs: list[Result]) -> dict[str, Any]:
    """A side's runs as one: medians over the repeats, the curve of the run of median time."""
    seconds = statistics.median_low(run.seconds for run in runs)
    typical = next(run for run in runs if run.seconds == seconds)
    last = typical.curve_losses[-max(1, len(typical.curve_losses) // 4) :]
    return {
        "side": typical.side,
        "seconds": statistics.median(run.seconds for run in runs),
        "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
        "all_seconds": [run.seconds for run in runs],
        "steps": typical.steps,
        "training_loss": statistics.fmean(last),
        "held_out_loss": statistics.median(run.held_out_loss for run in runs),
        "peak_rss_mib": statistics.median(run.peak_rss for run in runs) / MIB,
        "tokens": typical.tokens,
        "padded_tokens": typical.padded_tokens,
        "curve": {
            "seconds": [round(value, 3) for value in typical.curve_seconds],
            "losses": [round(value, 4) for value in typical.curve_losses],
        },
    }


# -- table -------------------------------------------------------------------------------------------------------


def table(mode: str, measured: dict[str, Any]) -> str:
    """Markdown: every setting, a line for each side, and whether the targets are met."""
    settings, sides = measured["settings"], measured["sides"]
    ours = next((side for side in sides if side["side"] == OURS), None)
    lines = [
        f"**One epoch, {WHAT[mode]}**: {settings['rows']} docstring rows, LoRA r 16 alpha 32 on all linear layers, "
        f"dropout {settings['dropout']:g}, AdamW, learning rate {settings['sides'][0]['learning_rate']:g} falling "
        f"linearly, bf16 base, gradients clipped at 1, median of {settings['repeats']}. Training "
        "loss: mean of the last quarter of the steps. Positions: what went through the model, with padding.",
        "",
        *(f"- {described(side, settings['order'])}" for side in settings["sides"]),
        "",
        "| | seconds | CPU seconds | s / step | ours / it | training loss | held-out loss | positions | peak RSS |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for side in sides:
        ratio = "" if ours is None else f"{ours['seconds'] / side['seconds']:.2f}"
        lines.append(
            f"| {side['side']} | {side['seconds']:.1f} | {side['cpu_seconds']:.1f} "
            f"| {side['seconds'] / side['steps']:.2f} | {ratio} "
            f"| {side['training_loss']:.4f} | {side['held_out_loss']:.4f} | {side['padded_tokens']:,} "
            f"| {side['peak_rss_mib']:.0f} MiB |"
        )
    theirs = next((side for side in sides if side["side"] == TRL), None)
    verdicts = [] if ours is None or theirs is None else ["", verdict(mode, ours, theirs)]
    return "\n".join([*lines, *verdicts, "", f"Measured on {measured['machine']}."]) + "\n"


def described(side: dict[str, Any], order: str) -> str:
    """Every setting of a side that another may have otherwise."""
    if side["same"]:
        batches = f"rows in {'length-grouped' if order == 'grouped' else 'the file’s'} order, the same collator"
    elif side["side"] == OURS:
        batches = "length-grouped batches padded to a multiple of 8"
    else:
        batches = "random batches padded to their longest row, its own tokenisation (labels equal to ours, checked)"
    trainer = "AdapterTrainer" if side["side"] == OURS else "SFTTrainer on a PEFT model"
    return (
        f"{side['side']}: {trainer}, batch {side['batch']} x {side['accumulation']}, {batches}, {side['attention']} "
        f"attention, autocast {'bf16' if side['autocast'] else 'off'}, gradient checkpointing "
        f"{'on' if side['checkpointing'] else 'off'}"
    )


def verdict(mode: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    ratio = ours["seconds"] / theirs["seconds"]
    cpu = ours["cpu_seconds"] / theirs["cpu_seconds"]
    met = "met" if ratio <= TARGETS[mode] else "missed"
    text = f"Time, ours to TRL's: {ratio:.2f} (target ≤ {TARGETS[mode]:.2f}: {met}); CPU time {cpu:.2f}."
    for name, head in (("training_loss", "training loss"), ("held_out_loss", "held-out loss")):
        difference = ours[name] / theirs[name] - 1
        text += f" {head.capitalize()}: {difference:+.2%}"
        if mode == "same":
            text += f" (within {LOSS_TOLERANCE:.0%}: {'yes' if abs(difference) <= LOSS_TOLERANCE else 'no'})"
        text += "."
    return text


if __name__ == "__main__":
    main()
