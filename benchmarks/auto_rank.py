"""Automatic ranks and AdaLoRA against LoRA of one rank with as many parameters, paired over seeds and rows.

    python -m benchmarks.auto_rank                         # every cell that is missing, then table and picture
    python -m benchmarks.auto_rank --only modules-auto-1   # one cell: task-arm-seed
    python -m benchmarks.auto_rank --missing               # names the cells that are still to be measured
    python -m benchmarks.auto_rank --draw                  # table and picture from the cells that are there

SmolLM2-135M-Instruct learns docstrings (`artifacts/`, made by the fetch and prepare stages), and of which package of
the standard library a function is. For one seed all arms see the same batches in the same order. Each cell is kept in
a file of its own, so a run that was cut off goes on. `epoch-adalora-0` and `epoch-fixed-0` are whole epochs on NF4.
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

from benchmarks.auto_rank_cells import (
    ADALORA,
    ARMS,
    CLASSES,
    DOCSTRINGS,
    EPOCH,
    FIXED,
    HELD_OUT_PER_CLASS,
    MODULES,
    RANK,
    RATES,
    Cell,
    run_cell,
)
from benchmarks.auto_rank_picture import draw
from benchmarks.machine import machine
from benchmarks.steps import quiet

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 10_000
EPOCH_ROWS = 1200
SAID = {
    DOCSTRINGS: "docstrings, nats a token",
    MODULES: f"package of a function ({CLASSES} classes), nats",
    EPOCH: "docstrings, a whole epoch on NF4, nats a token",
}


def main() -> None:
    options = parse()
    quiet()
    cells = [cell for cell in cells_of(options) if options.only in (None, cell.name)]
    missing = [cell for cell in cells if read(options, cell) is None]
    if options.missing:
        print("\n".join(cell.name for cell in missing))
        return
    for cell in (bar := tqdm([] if options.draw else missing, unit="cell", disable=None)):
        bar.set_postfix_str(cell.name)
        with tempfile.TemporaryDirectory() as scratch:
            rows, held_out = sizes(options, cell)
            result = run_cell(cell, rows, held_out, options.base, options.data, Path(scratch))
        write(options, cell, asdict(result) | {"machine": machine()})
    if not options.only:
        report(options)


def report(options: argparse.Namespace) -> None:
    there = {cell.name: found for cell in cells_of(options) if (found := read(options, cell)) is not None}
    measured = {
        "settings": settings_of(options),
        "cells": there,
        "comparisons": [c for task in (DOCSTRINGS, MODULES) for arm in ARMS[1:] if (c := comparison(there, task, arm))],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "auto_rank.json").write_text(json.dumps(without_scores(measured), indent=1) + "\n")
    text = table(measured)
    (options.folder / "auto_rank.md").write_text(text)
    draw(measured, options.folder / "auto_rank.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.auto_rank", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="of each arm, at least 2")
    parser.add_argument("--rows", type=int, default=320, help="training rows of a cell")
    parser.add_argument("--held-out", type=int, default=128, help="docstring rows that a cell is judged on")
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder")
    parser.add_argument("--data", type=Path, default=Path("artifacts/data"), help="folder of the prepared splits")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument(
        "--cells", type=Path, default=Path(tempfile.gettempdir()) / "peftcore-auto-rank", help="where cells are kept"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", help="measure this cell: task-arm-seed")
    chosen.add_argument("--missing", action="store_true", help="name the cells that are missing; measure nothing")
    chosen.add_argument("--draw", action="store_true", help="table and picture from the cells that are there")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds: {options.seeds} says nothing of how results scatter; give at least 2")
    if options.only and options.only not in (names := [cell.name for cell in cells_of(options)]):
        parser.error(f"--only: there is no cell {options.only!r}; there are {' '.join(names)}")
    for path in (options.base / "config.json", options.data / "train.parquet", options.data / "test.parquet"):
        if not path.exists():
            parser.error(f"there is no {path}; run the pipeline's fetch and prepare stages first")
    return options


# -- cells -----------------------------------------------------------------------------------------------------------


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All cells, whole seeds first, so that what is there can be compared."""
    compared = [
        Cell(task, arm, seed) for seed in range(options.seeds) for task in (DOCSTRINGS, MODULES) for arm in ARMS
    ]
    return [*compared, Cell(EPOCH, ADALORA, 0), Cell(EPOCH, FIXED, 0)]


def sizes(options: argparse.Namespace, cell: Cell) -> tuple[int, int]:
    """Training and held-out rows."""
    if cell.task == EPOCH:
        return EPOCH_ROWS, options.held_out
    return options.rows, CLASSES * HELD_OUT_PER_CLASS if cell.task == MODULES else options.held_out


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {"rows": options.rows, "held_out": options.held_out, "rank": RANK, "learning_rates": RATES}


def read(options: argparse.Namespace, cell: Cell) -> dict[str, Any] | None:
    """A cell that was measured in this very setting, or None."""
    file = options.cells / f"{cell.name}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    return kept["cell"] if kept.get("settings") == settings_of(options) else None


def write(options: argparse.Namespace, cell: Cell, found: dict[str, Any]) -> None:
    options.cells.mkdir(parents=True, exist_ok=True)
    partial = options.cells / f"{cell.name}.partial"
    partial.write_text(json.dumps({"settings": settings_of(options), "cell": found}))
    partial.replace(options.cells / f"{cell.name}.json")


# -- figures ---------------------------------------------------------------------------------------------------------


def loss_of(cell: dict[str, Any]) -> float:
    """Mean loss of the held-out rows (nats a token, or nats)."""
    return float(np.average(cell["losses"], weights=cell["weights"]))


def comparison(cells: dict[str, Any], task: str, arm: str) -> dict[str, Any] | None:
    """An arm minus LoRA of one rank on the seeds that both have; None below two of them.

    95 % intervals: over seeds by Student's t, over held-out rows by the bootstrap, both of paired differences.
    """
    pairs = [
        (ours, theirs)
        for cell, ours in cells.items()
        if cell.startswith(f"{task}-{arm}-") and (theirs := cells.get(cell.replace(arm, FIXED)))
    ]
    if len(pairs) < 2:
        return None
    by_seed = np.array([loss_of(ours) - loss_of(theirs) for ours, theirs in pairs])
    half = float(student.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / math.sqrt(len(by_seed)))
    weights = np.array(pairs[0][0]["weights"])
    by_row = np.mean([np.subtract(ours["losses"], theirs["losses"]) for ours, theirs in pairs], axis=0)
    drawn = np.random.default_rng(0).integers(len(weights), size=(RESAMPLES, len(weights)))
    means = (by_row * weights)[drawn].sum(1) / weights[drawn].sum(1)
    mean = float(by_seed.mean())
    return {
        "task": task,
        "arm": arm,
        "difference": mean,
        "by_seed": by_seed.tolist(),
        "over_seeds": [mean - half, mean + half],
        "over_rows": [float(q) for q in np.quantile(means, [0.025, 0.975])],
    }


def verdict(one: dict[str, Any]) -> str:
    """What both intervals say."""
    intervals = (one["over_seeds"], one["over_rows"])
    if all(high < 0 for _, high in intervals):
        return "better"
    return "worse" if all(low > 0 for low, _ in intervals) else "not decided"


def without_scores(measured: dict[str, Any]) -> dict[str, Any]:
    """What is kept beside the table: the searches' credit of every direction is left to the cells' own files."""
    cells = {
        name: cell | {"search": cell["search"] and {k: cell["search"][k] for k in ("loss_before", "loss_after")}}
        for name, cell in measured["cells"].items()
    }
    return measured | {"cells": cells}


def table(measured: dict[str, Any]) -> str:
    """Markdown: a row for each arm of each task, then the comparisons."""
    cells, settings = measured["cells"], measured["settings"]
    lines = [
        f"SmolLM2-135M-Instruct in bf16, all linear layers, {settings['rows']} training rows, one epoch, batches of 8; "
        f"fixed: LoRA r {RANK}; auto: ranks by `find_ranks` for as many parameters; adalora: from 24 to {RANK} "
        f"triplets a layer. Learning rates {', '.join(f'{arm} {rate:g}' for arm, rate in RATES.items())}. Means over "
        "seeds ± their standard deviation; seconds are CPU time on one thread.",
        "",
        "| task | arm | seeds | parameters | held-out loss | accuracy | ranks | search, s | training, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task in (DOCSTRINGS, MODULES, EPOCH):
        for arm in ARMS:
            own = [cell for name, cell in cells.items() if name.startswith(f"{task}-{arm}-")]
            if own:
                lines.append(f"| {SAID[task]} | {arm} | {len(own)} | {_row(own)} |")
    lines += [
        "",
        "Against LoRA of one rank, negative is better:",
        "",
        "| task | arm | seeds | difference | 95 % over seeds | 95 % over rows | |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for one in measured["comparisons"]:
        intervals = " | ".join(f"{low:+.4f} to {high:+.4f}" for low, high in (one["over_seeds"], one["over_rows"]))
        lines.append(
            f"| {SAID[one['task']]} | {one['arm']} | {len(one['by_seed'])} | {one['difference']:+.4f} | {intervals} "
            f"| {verdict(one)} |"
        )
    where = next(iter(cells.values()))["machine"] if cells else machine()
    return "\n".join([*lines, "", f"Measured on {where}."]) + "\n"


def _row(cells: list[dict[str, Any]]) -> str:
    right = [100 * float(np.mean(cell["right"])) for cell in cells if cell["right"]]
    ranks = [rank for cell in cells for rank in cell["ranks"].values()]
    return " | ".join(
        [
            f"{np.mean([cell['trainable'] for cell in cells]):,.0f}",
            _scatter([loss_of(cell) for cell in cells], 3),
            f"{_scatter(right, 1)} %" if right else "–",
            f"{min(ranks)} to {max(ranks)}",
            f"{np.mean([cell['search_seconds'] for cell in cells]):.0f}" if cells[0]["search"] else "–",
            f"{np.mean([cell['train_seconds'] for cell in cells]):.0f}",
        ]
    )


def _scatter(values: list[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
