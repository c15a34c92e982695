"""Whether QLoRA reaches 16-bit LoRA: held-out perplexity of bases and trained adapters, paired over seeds and rows.

    python -m benchmarks.qlora                    # every cell that is missing, then results/qlora.md, .json and .png
    python -m benchmarks.qlora --only nf4-1       # one cell: arm-seed, or arm-untrained
    python -m benchmarks.qlora --missing          # names the cells that are still to be measured
    python -m benchmarks.qlora --draw             # table and picture from the cells that are there

SmolLM2-135M-Instruct learns docstrings (`artifacts/`, made by the fetch and prepare stages). For one seed all arms see
the same batches in the same order. Each cell is kept in a file of its own, so a run that was cut off goes on.
"""

import argparse
import json
import math
from dataclasses import asdict
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
from benchmarks.qlora_cell import ARMS, Setting, measure_cell
from benchmarks.qlora_picture import draw
from benchmarks.steps import quiet

UNTRAINED = "untrained"
REFERENCE, CLAIM = "bf16", "nf4"
MARGIN = 0.02
"""Nats a token within which two arms count as equal: 2 % of the perplexity."""


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

    def measure(name: str) -> Cell:
        arm, seed = parts(name)
        return measure_cell(setting, ARMS[arm], None if seed == UNTRAINED else int(seed))

    if measure_missing(options, names(options), said(setting), measure):
        report(options, setting)


def report(options: argparse.Namespace, setting: Setting) -> None:
    cells = there(options, names(options), said(setting))
    measured = {
        "settings": said(setting),
        "margin": MARGIN,
        "titles": {name: arm.title for name, arm in ARMS.items()},
        "summary": {name: summary(cells, name) for name in ARMS},
        "comparisons": comparisons(cells),
        "cells": cells,
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "qlora.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    text = table(measured)
    (options.folder / "qlora.md").write_text(text, encoding="utf-8")
    draw(measured, options.folder / "qlora.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = parser_of("qlora", __doc__)
    parser.add_argument("--trained", type=_arms, default=["bf16", "nf4", "nf4-loftq"], help="arms, parted by commas")
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--test-rows", type=int, default=192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    options = parser.parse_args()
    if not {REFERENCE, CLAIM} <= set(options.trained):
        parser.error(f"--trained: {REFERENCE} and {CLAIM} are what is compared; name both")
    check(parser, options, names(options))
    return options


def _arms(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - ARMS.keys():
        raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    return chosen


# -- cells -------------------------------------------------------------------------------------------------------


def names(options: argparse.Namespace) -> list[str]:
    """All cells, arm-seed, whole seeds first, so that what is there can be compared."""
    trained = [f"{arm}-{seed}" for seed in range(options.seeds) for arm in options.trained]
    return [f"{arm}-{UNTRAINED}" for arm in ARMS] + trained


def parts(name: str) -> tuple[str, str]:
    """(arm, seed)"""
    arm, _, seed = name.rpartition("-")
    return arm, seed


def said(setting: Setting) -> dict[str, Any]:
    return asdict(setting) | {"base": str(setting.base), "data": str(setting.data)}


# -- figures -----------------------------------------------------------------------------------------------------


def loss_of(cell: dict[str, Any]) -> float:
    """Mean over the tokens of all rows (nats)."""
    return float(np.average(cell["losses"], weights=cell["tokens"]))


def trained_of(cells: dict[str, Any], arm: str) -> dict[str, Any]:
    """{seed: cell} of an arm."""
    split = ((parts(name), cell) for name, cell in cells.items())
    return {seed: cell for (of, seed), cell in split if of == arm and seed != UNTRAINED}


def summary(cells: dict[str, Any], arm: str) -> dict[str, Any]:
    """What the table and the picture show of an arm; None and [] for what has not been measured."""
    start, trained = cells.get(f"{arm}-{UNTRAINED}"), list(trained_of(cells, arm).values())
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
            losses, reference = ([side[seed]["losses"] for seed in seeds] for side in (ours, theirs))
            one = paired(losses, reference, ours[seeds[0]]["tokens"])
            found.append({"arm": arm, "verdict": verdict(one, MARGIN)} | one)
    return found


def table(measured: dict[str, Any]) -> str:
    """Markdown: a row for each arm, then the comparisons."""
    settings = measured["settings"]
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
            + (f"{scatter(found['trained'], 2)} | {scatter(found['losses'], 3)} | " if found["trained"] else "– | – | ")
            + (f"{np.mean(found['seconds']):.0f} |" if found["seconds"] else "– |")
        )
    lines += [
        "",
        f"Against 16-bit LoRA, nats a token; the margin, set beforehand, is {MARGIN} (2 % of the perplexity):",
        "",
        "| | seeds | difference | 95 % over seeds | 95 % over rows | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    lines += [comparison_row([ARMS[one["arm"]].title], one, one["verdict"]) for one in measured["comparisons"]]
    return "\n".join([*lines, "", f"Measured on {machines(measured['cells'])}."]) + "\n"


if __name__ == "__main__":
    main()
