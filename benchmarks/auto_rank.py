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
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

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
from benchmarks.cells import (
    check,
    comparison_row,
    machines,
    measure_missing,
    paired,
    parser_of,
    scatter,
    there,
    verdict,
)
from benchmarks.steps import quiet

EPOCH_ROWS = 1200
SAID = {
    DOCSTRINGS: "docstrings, nats a token",
    MODULES: f"package of a function ({CLASSES} classes), nats",
    EPOCH: "docstrings, a whole epoch on NF4, nats a token",
}


def main() -> None:
    options = parse()
    quiet()
    cells = {cell.name: cell for cell in cells_of(options)}

    def measure(name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            rows, held_out = sizes(options, cells[name])
            return asdict(run_cell(cells[name], rows, held_out, options.base, options.data, Path(scratch)))

    if measure_missing(options, list(cells), settings_of(options), measure):
        report(options)


def report(options: argparse.Namespace) -> None:
    cells = there(options, [cell.name for cell in cells_of(options)], settings_of(options))
    measured = {
        "settings": settings_of(options),
        "cells": cells,
        "comparisons": [c for task in (DOCSTRINGS, MODULES) for arm in ARMS[1:] if (c := comparison(cells, task, arm))],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "auto_rank.json").write_text(
        json.dumps(without_scores(measured), indent=1) + "\n", encoding="utf-8"
    )
    text = table(measured)
    (options.folder / "auto_rank.md").write_text(text, encoding="utf-8")
    draw(measured, options.folder / "auto_rank.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = parser_of("auto_rank", __doc__)
    parser.add_argument("--rows", type=int, default=320, help="training rows of a cell")
    parser.add_argument("--held-out", type=int, default=96, help="docstring rows that a cell is judged on")
    options = parser.parse_args()
    check(parser, options, [cell.name for cell in cells_of(options)])
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


# -- figures ---------------------------------------------------------------------------------------------------------


def loss_of(cell: dict[str, Any]) -> float:
    """Mean loss of the held-out rows (nats a token, or nats)."""
    return float(np.average(cell["losses"], weights=cell["weights"]))


def comparison(cells: dict[str, Any], task: str, arm: str) -> dict[str, Any] | None:
    """An arm minus LoRA of one rank on the seeds that both have; None below two of them."""
    pairs = [
        (ours, theirs)
        for cell, ours in cells.items()
        if cell.startswith(f"{task}-{arm}-") and (theirs := cells.get(cell.replace(arm, FIXED)))
    ]
    if len(pairs) < 2:
        return None
    ours, theirs = zip(*pairs, strict=True)
    one = paired([cell["losses"] for cell in ours], [cell["losses"] for cell in theirs], ours[0]["weights"])
    return {"task": task, "arm": arm} | one


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
        "triplets a layer on average, which are fewer parameters where they are kept in narrow layers. Learning rates "
        f"{', '.join(f'{arm} {rate:g}' for arm, rate in RATES.items())}. Means over seeds ± their standard deviation; "
        "seconds are CPU time on one thread.",
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
    lines += [comparison_row([SAID[one["task"]], one["arm"]], one, verdict(one)) for one in measured["comparisons"]]
    return "\n".join([*lines, "", f"Measured on {machines(cells)}."]) + "\n"


def _row(cells: list[dict[str, Any]]) -> str:
    right = [100 * float(np.mean(cell["right"])) for cell in cells if cell["right"]]
    ranks = [rank for cell in cells for rank in cell["ranks"].values()]
    return " | ".join(
        [
            f"{np.mean([cell['trainable'] for cell in cells]):,.0f}",
            scatter([loss_of(cell) for cell in cells], 3),
            f"{scatter(right, 1)} %" if right else "–",
            f"{min(ranks)} to {max(ranks)}",
            f"{np.mean([cell['search_seconds'] for cell in cells]):.0f}" if cells[0]["search"] else "–",
            f"{np.mean([cell['train_seconds'] for cell in cells]):.0f}",
        ]
    )


if __name__ == "__main__":
    main()
