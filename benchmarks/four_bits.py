"""What calibration gives back of what four bits cost: held-out loss of quantised bases, untrained and trained.

    python -m benchmarks.four_bits                                 # the untrained table: results/four_bits.md and .json
    python -m benchmarks.four_bits --train --seeds 5 --steps 75    # trained cells, too
    python -m benchmarks.four_bits --missing                       # names the cells that are still to be measured

The loss is that of the completions of held-out docstring rows. The first base is the pipeline's own, whose weights lie
on a Q4_1 grid already; the second, the merged champion of a run, lies off that grid. For one seed all arms see the same
batches in the same order. Each cell is kept in a file of its own, so a run that was cut off goes on. All
cells of an arm share one calibration.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import (
    Cell,
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
from benchmarks.four_bits_cell import ARMS, Cells, Setting
from benchmarks.steps import quiet

UNTRAINED = "untrained"
REFERENCE = "bf16"
MARGIN = 0.02
"""Nats a token within which two arms count as equal."""
BASES = {"base": "pipeline's base, on a Q4_1 grid", "merged": "merged champion, off that grid"}
TRAINING = ("learning_rate", "batch", "accumulation", "steps")
"""Settings on which untrained cells do not depend."""
MIB = 2**20


def main() -> None:
    options = parse()
    quiet()
    setting = Setting(
        options.data,
        options.calibration_rows,
        options.test_rows,
        options.rank,
        options.learning_rate,
        options.batch,
        options.accumulation,
        options.steps,
    )

    measured = Cells(setting)

    def measure(name: str) -> Cell:
        base, arm, seed = parts(name)
        return measured.measure(getattr(options, base), ARMS[arm], None if seed == UNTRAINED else int(seed))

    groups = [(group, said(setting, options, group)) for group in groups_of(options)]
    chosen = [(group, settings) for group, settings in groups if not options.only or options.only in group]
    finished = [measure_missing(options, group, settings, measure) for group, settings in chosen]
    if all(finished):
        report(options, groups)


def report(options: argparse.Namespace, groups: list[tuple[list[str], dict[str, Any]]]) -> None:
    cells = {name: cell for group, settings in groups for name, cell in there(options, group, settings).items()}
    settings = {name: value for _, each in groups for name, value in each.items()}
    measured = {
        "settings": settings,
        "margin": MARGIN,
        "untrained": untrained(cells),
        "trained": trained(cells),
        "comparisons": comparisons(cells),
        "cells": cells,
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "four_bits.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    text = table(measured)
    (options.folder / "four_bits.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = parser_of("four_bits", __doc__)
    parser.add_argument("--merged", type=Path, default=Path("artifacts/merged"), help="merged model of a run")
    parser.add_argument("--train", action="store_true", help="train each of --arms from --seeds seeds on both bases")
    parser.add_argument("--steps", type=int, default=75, help="optimiser steps of a trained cell")
    parser.add_argument("--arms", type=_arms, default=["bf16", "nf4", "loftq", "qera"], help="trained arms")
    parser.add_argument("--trained-bases", type=_bases, default=["base", "merged"], help="bases of the trained arms")
    parser.add_argument("--calibration-rows", type=int, default=96)
    parser.add_argument("--test-rows", type=int, default=96)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    options = parser.parse_args()
    if REFERENCE not in options.arms:
        parser.error(f"--arms: every arm is compared with {REFERENCE}; name it")
    if not (options.merged / "config.json").exists():
        parser.error(f"there is no {options.merged / 'config.json'}; run the pipeline's merge stage first")
    check(parser, options, [name for group in groups_of(options) for name in group])
    return options


def _arms(text: str) -> list[str]:
    return _chosen(text, ARMS)


def _bases(text: str) -> list[str]:
    return _chosen(text, BASES)


def _chosen(text: str, known: dict[str, Any]) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - known.keys():
        raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return chosen


# -- cells -------------------------------------------------------------------------------------------------------


def groups_of(options: argparse.Namespace) -> list[list[str]]:
    """Return the cells of each arm, base.arm.untrained, then base.arm.seed; the trained arms come first."""
    arms = [*options.arms, *(arm for arm in ARMS if arm not in options.arms)]
    groups = []
    for base in BASES:
        for arm in arms:
            groups.append([f"{base}.{arm}.{UNTRAINED}"])
            if options.train and arm in options.arms and base in options.trained_bases:
                groups.append([f"{base}.{arm}.{seed}" for seed in range(options.seeds)])
    return groups


def parts(name: str) -> tuple[str, str, str]:
    """(base, arm, seed)"""
    base, arm, seed = name.split(".")
    return base, arm, seed


def said(setting: Setting, options: argparse.Namespace, group: list[str]) -> dict[str, Any]:
    """Return the settings on which the cells of a group depend."""
    settings = asdict(setting) | {"data": str(setting.data), "base": str(options.base), "merged": str(options.merged)}
    if group[0].endswith(UNTRAINED):
        for name in TRAINING:
            del settings[name]
    return settings


# -- figures -----------------------------------------------------------------------------------------------------


def loss_of(cell: Cell) -> float:
    """Mean over the tokens of all rows (nats)."""
    return float(np.average(cell["losses"], weights=cell["tokens"]))


def untrained(cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """Loss of each untrained cell, its gap to 16 bits, and the share of NF4's gap that the arm closes."""
    rows = []
    for base in BASES:
        losses = {arm: loss_of(cells[name]) for arm in ARMS if (name := f"{base}.{arm}.{UNTRAINED}") in cells}
        for arm, loss in losses.items():
            cell = cells[f"{base}.{arm}.{UNTRAINED}"]
            row = {"base": base, "arm": arm, "loss": loss}
            row |= {name: cell.get(name) for name in ("calibration_seconds", "calibration_memory")}
            if REFERENCE in losses and "nf4" in losses:
                gap, whole = loss - losses[REFERENCE], losses["nf4"] - losses[REFERENCE]
                row |= {"gap": gap, "closed": 1 - gap / whole}
            rows.append(row)
    return rows


def by_seed(cells: dict[str, Cell], base: str, arm: str) -> dict[str, Cell]:
    """{seed: trained cell}"""
    split = ((parts(name), cell) for name, cell in cells.items())
    return {seed: cell for (of, which, seed), cell in split if (of, which) == (base, arm) and seed != UNTRAINED}


def trained(cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """Losses over the seeds of each trained arm."""
    rows = []
    for base in BASES:
        for arm in ARMS:
            if of_arm := by_seed(cells, base, arm):
                seconds = float(np.mean([cell["seconds"] for cell in of_arm.values()]))
                losses = [loss_of(cell) for cell in of_arm.values()]
                rows.append({"base": base, "arm": arm, "losses": losses, "seconds": seconds})
    return rows


def comparisons(cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """Every trained arm against 16-bit LoRA on the seeds that both have; an arm with fewer than two is left out."""
    rows = []
    for base in BASES:
        for arm in ARMS:
            ours, theirs = by_seed(cells, base, arm), by_seed(cells, base, REFERENCE)
            seeds = sorted(ours.keys() & theirs.keys())
            if arm != REFERENCE and len(seeds) > 1:
                losses, reference = ([side[seed]["losses"] for seed in seeds] for side in (ours, theirs))
                one = paired(losses, reference, ours[seeds[0]]["tokens"])
                rows.append({"base": base, "arm": arm, "verdict": verdict(one, MARGIN)} | one)
    return rows


def table(measured: dict[str, Any]) -> str:
    """Markdown: the untrained arms, the trained ones, and their differences to 16 bits."""
    settings = measured["settings"]
    lines = [
        f"Untrained loss of the completions of {settings['test_rows']} held-out docstring rows (nats a token), "
        f"SmolLM2-135M-Instruct. Starts have rank {settings['rank']}; calibration on {settings['calibration_rows']} "
        "training rows. Memory is the peak during calibration above its start.",
        "",
        "| base | storage, calibration, start | loss | gap to 16 bits | gap closed | CPU s | memory, MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in measured["untrained"]:
        memory, gap = row["calibration_memory"], row.get("gap")
        lines.append(
            f"| {BASES[row['base']]} | {ARMS[row['arm']].title} | {row['loss']:.3f} | "
            + ("– | – | " if gap is None else f"{gap:+.3f} | {row['closed']:.0%} | ")
            + f"{row['calibration_seconds']:.0f} | {'–' if memory is None else f'{memory / MIB:.0f}'} |"
        )
    if measured["trained"]:
        lines += [
            "",
            f"Trained: LoRA r {settings['rank']} on all linear layers, {settings['steps']} steps of "
            f"{settings['batch']} x {settings['accumulation']} rows, learning rate {settings['learning_rate']:g}; mean "
            "of the seeds ± their standard deviation.",
            "",
            "| base | storage, calibration, start | seeds | loss | training, CPU s |",
            "|---|---|---:|---:|---:|",
        ]
        lines += [
            f"| {BASES[row['base']]} | {ARMS[row['arm']].title} | {len(row['losses'])} | {scatter(row['losses'], 3)} | "
            f"{row['seconds']:.0f} |"
            for row in measured["trained"]
        ]
    if measured["comparisons"]:
        lines += [
            "",
            f"Against 16-bit LoRA, nats a token; the margin, set beforehand, is {MARGIN}:",
            "",
            "| base | | seeds | difference | 95 % over seeds | 95 % over rows | |",
            "|---|---|---:|---:|---:|---:|---|",
        ]
        lines += [
            comparison_row([BASES[one["base"]], ARMS[one["arm"]].title], one, one["verdict"])
            for one in measured["comparisons"]
        ]
    return "\n".join([*lines, "", f"Measured on {machines(measured['cells'])}."]) + "\n"


if __name__ == "__main__":
    main()
