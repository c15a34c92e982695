"""Whether QLoRA reaches 16-bit LoRA: held-out perplexity of bases and trained adapters, paired over seeds and rows.

    python -m benchmarks.qlora                    # every cell that is missing, then results/qlora.md, .json and .png
    python -m benchmarks.qlora --only nf4/1       # one cell: arm/seed, or arm/untrained
    python -m benchmarks.qlora --missing          # names the cells that are still to be measured
    python -m benchmarks.qlora --draw             # table and picture from the cells that are there

SmolLM2-135M-Instruct learns docstrings (`artifacts/`, made by the fetch and prepare stages). For one seed all arms see
the same batches in the same order. Each cell is kept in a file of its own, so a run that was cut off goes on.
"""

import argparse
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.qlora_cell import ARMS, Setting, measure_cell
from benchmarks.qlora_picture import draw
from benchmarks.steps import quiet

RESULTS = Path(__file__).parent / "results"
UNTRAINED = "untrained"
REFERENCE, CLAIM = "bf16", "nf4"
MARGIN = 0.02
"""Nats a token within which two arms count as equal: 2 % of the perplexity."""
RESAMPLES = 10_000


def main() -> None:
    options = parse()
    quiet()
    setting = Setting(
        options.base,
        options.data,
        options.train_rows,
        options.test_rows,
        options.rank,
        options.learning_rate,
        options.batch,
        options.accumulation,
    )
    cells = [options.only] if options.only else names(options)
    missing = [name for name in cells if read(options.cells, name, setting) is None]
    if options.missing:
        print("\n".join(missing))
        return
    bar = tqdm([] if options.draw else missing, unit="cell", disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        arm, seed = name.split("/")
        found = measure_cell(setting, ARMS[arm], None if seed == UNTRAINED else int(seed))
        write(options.cells, name, setting, found | {"machine": machine()})
    if options.only:
        return
    report(options, setting)


def report(options: argparse.Namespace, setting: Setting) -> None:
    there = {name: found for name in names(options) if (found := read(options.cells, name, setting))}
    measured = {
        "settings": said(setting),
        "margin": MARGIN,
        "titles": {name: arm.title for name, arm in ARMS.items()},
        "summary": {name: summary(there, name) for name in ARMS},
        "comparisons": comparisons(there),
        "cells": there,
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "qlora.json").write_text(json.dumps(measured, indent=1) + "\n")
    text = table(measured)
    (options.folder / "qlora.md").write_text(text)
    draw(measured, options.folder / "qlora.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.qlora", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="of each trained arm, at least 2")
    parser.add_argument("--trained", type=_arms, default=["bf16", "nf4", "nf4-loftq"], help="arms, parted by commas")
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--test-rows", type=int, default=192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder")
    parser.add_argument("--data", type=Path, default=Path("artifacts/data"), help="folder of the prepared splits")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument(
        "--cells", type=Path, default=Path(tempfile.gettempdir()) / "peftcore-qlora", help="where cells are kept"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", help="measure this cell: arm/seed or arm/untrained")
    chosen.add_argument("--missing", action="store_true", help="name the cells that are missing; measure nothing")
    chosen.add_argument("--draw", action="store_true", help="table and picture from the cells that are there")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds: {options.seeds} says nothing of how results scatter; give at least 2")
    if not {REFERENCE, CLAIM} <= set(options.trained):
        parser.error(f"--trained: {REFERENCE} and {CLAIM} are what is compared; name both")
    if options.only and options.only not in names(options):
        parser.error(f"--only: there is no cell {options.only!r}; there are {' '.join(names(options))}")
    for path in (options.base / "config.json", options.data / "train.parquet", options.data / "test.parquet"):
        if not path.exists():
            parser.error(f"there is no {path}; run the pipeline's fetch and prepare stages first")
    return options


def _arms(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - ARMS.keys():
        raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    return chosen


# -- cells -------------------------------------------------------------------------------------------------------


def names(options: argparse.Namespace) -> list[str]:
    """All cells, whole seeds first, so that what is there can be compared."""
    trained = [f"{arm}/{seed}" for seed in range(options.seeds) for arm in options.trained]
    return [f"{arm}/{UNTRAINED}" for arm in ARMS] + trained


def said(setting: Setting) -> dict[str, Any]:
    return asdict(setting) | {"base": str(setting.base), "data": str(setting.data)}


def read(folder: Path, name: str, setting: Setting) -> dict[str, Any] | None:
    """A cell that was measured in this very setting, or None."""
    file = folder / f"{name.replace('/', '-')}.json"
    if not file.exists():
        return None
    kept = json.loads(file.read_text())
    return kept["cell"] if kept["settings"] == said(setting) else None


def write(folder: Path, name: str, setting: Setting, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "cell.partial"
    partial.write_text(json.dumps({"settings": said(setting), "cell": found}))
    partial.replace(folder / f"{name.replace('/', '-')}.json")


# -- figures -----------------------------------------------------------------------------------------------------


def loss_of(cell: dict[str, Any]) -> float:
    """Mean over the tokens of all rows (nats)."""
    return float(np.average(cell["losses"], weights=cell["tokens"]))


def trained_of(cells: dict[str, Any], arm: str) -> dict[str, Any]:
    """{seed: cell} of an arm."""
    split = ((name.split("/"), cell) for name, cell in cells.items())
    return {seed: cell for (of, seed), cell in split if of == arm and seed != UNTRAINED}


def summary(cells: dict[str, Any], arm: str) -> dict[str, Any]:
    """What the table and the picture show of an arm; None and [] for what has not been measured."""
    start, trained = cells.get(f"{arm}/{UNTRAINED}"), list(trained_of(cells, arm).values())
    return {
        "weight_error": start and start["weight_error"],
        "untrained": start and math.exp(loss_of(start)),
        "losses": [loss_of(cell) for cell in trained],
        "trained": [math.exp(loss_of(cell)) for cell in trained],
        "seconds": [cell["seconds"] for cell in trained],
    }


def comparisons(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Every trained arm against 16-bit LoRA, on the seeds that both have; an arm with fewer than two is left out."""
    found = []
    for arm in ARMS:
        ours, theirs = trained_of(cells, arm), trained_of(cells, REFERENCE)
        seeds = sorted(ours.keys() & theirs.keys())
        if arm != REFERENCE and len(seeds) > 1:
            found.append(
                {"arm": arm, "seeds": len(seeds)} | compared([ours[s] for s in seeds], [theirs[s] for s in seeds])
            )
    return found


def compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Difference of the losses (nats a token), with 95 % intervals over seeds (Student's t) and rows (bootstrap)."""
    by_seed = np.array([loss_of(a) - loss_of(b) for a, b in zip(ours, theirs, strict=True)])
    half = student.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / math.sqrt(len(by_seed))
    tokens = np.array(ours[0]["tokens"])
    by_row = np.mean([np.subtract(a["losses"], b["losses"]) for a, b in zip(ours, theirs, strict=True)], axis=0)
    drawn = np.random.default_rng(0).integers(len(tokens), size=(RESAMPLES, len(tokens)))
    means = (by_row * tokens)[drawn].sum(1) / tokens[drawn].sum(1)
    mean = float(by_seed.mean())
    over_seeds = [mean - float(half), mean + float(half)]
    over_rows = [float(q) for q in np.quantile(means, [0.025, 0.975])]
    return {
        "difference": mean,
        "by_seed": by_seed.tolist(),
        "over_seeds": over_seeds,
        "over_rows": over_rows,
        "verdict": verdict(over_seeds, over_rows),
    }


def verdict(*intervals: list[float]) -> str:
    """What both intervals, (low, high) each, say of the difference."""
    if all(low > -MARGIN and high < MARGIN for low, high in intervals):
        return "equal within the margin"
    if all(low > 0 for low, _ in intervals):
        return "worse"
    if all(high < 0 for _, high in intervals):
        return "better"
    return "not decided"


def table(measured: dict[str, Any]) -> str:
    """Markdown: a row for each arm, then the comparisons."""
    settings = measured["settings"]
    machines = sorted({cell["machine"] for cell in measured["cells"].values()})
    lines = [
        f"Held-out perplexity of {settings['test_rows']} docstring rows, SmolLM2-135M-Instruct; trained: LoRA r "
        f"{settings['rank']} on all linear layers, {settings['train_rows']} rows, one epoch, batches of "
        f"{settings['batch']} x {settings['accumulation']}, learning rate {settings['learning_rate']:g}, mean of the "
        "seeds ± their standard deviation.",
        "",
        "| base | distance to the 16-bit weights | untrained | trained | loss, nats a token | training, CPU s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, arm in ARMS.items():
        found = measured["summary"][name]
        lines.append(
            f"| {arm.title} | "
            + (
                "– | – | "
                if found["untrained"] is None
                else f"{found['weight_error']:.2%} | {found['untrained']:.2f} | "
            )
            + (
                f"{_scatter(found['trained'], 2)} | {_scatter(found['losses'], 3)} | "
                if found["trained"]
                else "– | – | "
            )
            + (f"{np.mean(found['seconds']):.0f} |" if found["seconds"] else "– |")
        )
    lines += [
        "",
        f"Against 16-bit LoRA, nats a token; the margin, set beforehand, is {MARGIN} (2 % of the perplexity):",
        "",
        "| | seeds | difference | 95 % over seeds | 95 % over rows | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for one in measured["comparisons"]:
        intervals = " | ".join(f"{low:+.4f} to {high:+.4f}" for low, high in (one["over_seeds"], one["over_rows"]))
        lines.append(
            f"| {ARMS[one['arm']].title} | {one['seeds']} | {one['difference']:+.4f} | {intervals} | {one['verdict']} |"
        )
    return "\n".join([*lines, "", f"Measured on {'; '.join(machines)}."]) + "\n"


def _scatter(values: list[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
