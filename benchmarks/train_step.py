"""One training step (forward and backward) of an adapter: the floor, ours, HF PEFT; in one process, interleaved.

    python -m benchmarks.train_step --dtype bf16 --dropout 0.05 --repeats 9
    python -m benchmarks.train_step --all            # four settings with their targets: results/train_step.md and .json

SmolLM2-135M's weights from --base, or its shape with random weights; r = 16 on all linear layers; a batch of 4 x 256
tokens, the first two thirds of each row masked. What each row is stands in `benchmarks.steps`. The optimiser's step is
left out: it is the same for all and the floor has none.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peft

from benchmarks.machine import machine
from benchmarks.memory import peak_rss
from benchmarks.steps import (
    DTYPES,
    METHODS,
    MODEL_LOSS_ROWS,
    OUR_LOSS_ROWS,
    OURS,
    OURS_MODEL_LOSS,
    PEFT,
    ROWS,
    Setting,
    build,
    build_alone,
    check_equal,
    make_batch,
    measure,
    quiet,
    random_base,
    release,
    saved_bytes,
    step,
)

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
SAME, AS_USED, MEMORY = "/ PEFT", "/ PEFT as used", "saved / PEFT as used"
TARGETS: list[tuple[dict[str, Any], dict[str, dict[str, float]]]] = [
    ({"dtype": "bf16", "dropout": 0.0}, {OURS: {AS_USED: 0.62, "/ floor": 1.10}, OURS_MODEL_LOSS: {"/ floor": 1.10}}),
    (
        {"dtype": "bf16", "dropout": 0.05},
        {OURS: {AS_USED: 0.45, "/ floor": 1.12, MEMORY: 0.50}, OURS_MODEL_LOSS: {"/ floor": 1.12}},
    ),
    (
        {"dtype": "fp32", "dropout": 0.0},
        {OURS: {AS_USED: 0.75, "/ floor": 1.10}, OURS_MODEL_LOSS: {"/ floor": 1.10, SAME: 0.88}},
    ),
    (
        {"dtype": "bf16", "dropout": 0.0, "storage": "nf4"},
        {OURS: {AS_USED: 0.65, "/ floor": 1.12}, OURS_MODEL_LOSS: {"/ floor": 1.12}},
    ),
]
"""--all: settings, and the bounds of our rows in each."""

Figures = dict[str, Any]
"""A setting's measured rows as JSON holds them."""


def main() -> None:
    options = parse()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        setting = setting_of(options, options.base or random_base(Path(scratch) / "base", options.blocks))
        if options.alone:
            print(rss_alone(setting, options.alone))
        elif options.all:
            print(run_all(setting, Path(scratch), options))
        else:
            print(table(run(setting, Path(scratch), options)))
            print(f"{machine()}, peft {peft.__version__}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.train_step", description=str(__doc__).partition("\n")[0])
    default = Path("artifacts/base")
    parser.add_argument("--base", type=Path, default=default if default.is_dir() else None, help="model folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--storage", choices=("none", "nf4"), default="none", help="how the base is kept")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds, at least 7")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--blocks", type=int, default=30, help="of the random base")
    parser.add_argument("--rss", action="store_true", help="each row's peak RSS too, from a process of its own")
    parser.add_argument("--all", action="store_true", help="every setting that has a target; writes the results")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where --all writes")
    parser.add_argument("--alone", choices=ROWS, help="three steps of one row; prints its peak RSS in bytes")
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 7")
    return options


def setting_of(options: argparse.Namespace, folder: Path) -> Setting:
    names = ("dtype", "dropout", "storage", "method", "device", "rank", "batch", "length")
    return Setting(folder=folder, **{name: getattr(options, name) for name in names})


# -- measuring ---------------------------------------------------------------------------------------------------


def run(setting: Setting, scratch: Path, options: argparse.Namespace) -> Figures:
    """Check, then measure one setting."""
    check_equal(setting, scratch / "check")
    release(setting.device)
    rows = build(setting, scratch / "adapter")
    labels = make_batch(rows[0].model, setting)[1]
    for row in rows:
        row.saved = saved_bytes(row, labels)
    measure(rows, labels, options.repeats)
    seconds = {row.name: row.seconds for row in rows}
    same_loss = {name: group for group in (OUR_LOSS_ROWS, MODEL_LOSS_ROWS) for name in group}
    figures = {
        "setting": {
            **{name: value for name, value in vars(setting).items() if name not in ("folder", "blocks")},
            "base": str(options.base) if options.base else f"random, {options.blocks} blocks",
            "repeats": options.repeats,
        },
        "rows": [
            {
                "name": row.name,
                "seconds": row.seconds,
                "median_ms": 1e3 * statistics.median(row.seconds),
                "min_ms": 1e3 * min(row.seconds),
                "/ floor": _ratio(row.seconds, seconds[same_loss[row.name][0]]),
                SAME: _ratio(row.seconds, seconds[same_loss[row.name][2]]),
                AS_USED: _ratio(row.seconds, seconds[PEFT]),
                "saved_mib": row.saved / MIB,
                **({"gpu_peak_mib": row.cuda_peak / MIB} if setting.device == "cuda" else {}),
            }
            for row in rows
        ],
    }
    del rows
    release(setting.device)
    if options.rss:
        for row in figures["rows"]:
            row["rss_mib"] = rss_of(setting, row["name"]) / MIB
    return figures


def _ratio(seconds: list[float], others: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(mine / its for mine, its in zip(seconds, others, strict=True))


def rss_alone(setting: Setting, name: str) -> int:
    """Peak resident memory (bytes) of this process after three steps of one row."""
    row = build_alone(setting, name)
    labels = make_batch(row.model, setting)[1]
    for _ in range(3):
        step(row, labels)
    return peak_rss()


def rss_of(setting: Setting, name: str) -> int:
    """`rss_alone` in a process of its own, so that no other row is in it."""
    names = ("dtype", "dropout", "storage", "method", "device", "rank", "batch", "length")
    given = [text for option in names for text in (f"--{option}", str(getattr(setting, option)))]
    command = [sys.executable, "-m", "benchmarks.train_step", "--base", str(setting.folder), "--alone", name, *given]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def run_all(setting: Setting, scratch: Path, options: argparse.Namespace) -> str:
    """Every setting of TARGETS; writes train_step.json and train_step.md, and returns the latter.

    A setting has a process of its own, because one after another they take more memory than this machine may have.
    """
    measured: list[Figures] = []
    apart = {"max_workers": 1, "max_tasks_per_child": 1, "initializer": quiet}
    with ProcessPoolExecutor(mp_context=get_context("spawn"), **apart) as processes:
        for number, (changes, targets) in enumerate(TARGETS):
            changed = replace(setting, **changes)
            figures = processes.submit(run, changed, scratch / str(number), options).result()
            figures["targets"] = targets
            print(table(figures), flush=True)
            measured.append(figures)
    results = {"settings": measured, "machine": f"{machine()}, peft {peft.__version__}"}
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "train_step.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = markdown(results)
    (options.folder / "train_step.md").write_text(text, encoding="utf-8")
    return text


# -- tables ------------------------------------------------------------------------------------------------------


def title(setting: dict[str, Any]) -> str:
    storage = "" if setting["storage"] == "none" else f", {setting['storage']} base"
    return f"{setting['dtype']}{storage}, dropout {setting['dropout']:g}"


def details(setting: dict[str, Any]) -> str:
    return (
        f"base {setting['base']}, {setting['method']} r {setting['rank']} on all linear layers, batch "
        f"{setting['batch']} x {setting['length']}, {setting['device']}, {setting['repeats']} rounds"
    )


def table(figures: Figures) -> str:
    """One setting, to be read in a terminal."""
    rows = figures["rows"]
    extra = [(name, head) for name, head in EXTRAS.items() if name in rows[0]]
    lines = [
        f"train step: {title(figures['setting'])}; {details(figures['setting'])}",
        f"{'':20}{'median ms':>10}{'min ms':>9}{'/ floor':>9}{SAME:>8}{AS_USED:>16}{'saved MiB':>11}"
        + "".join(f"{head:>14}" for _, head in extra),
    ]
    for row in rows:
        lines.append(
            f"{row['name']:20}{row['median_ms']:10.0f}{row['min_ms']:9.0f}{row['/ floor']:9.2f}{row[SAME]:8.2f}"
            f"{row[AS_USED]:16.2f}{row['saved_mib']:11.0f}" + "".join(f"{row[name]:14.0f}" for name, _ in extra)
        )
    return "\n".join(lines)


EXTRAS = {"rss_mib": "peak RSS MiB", "gpu_peak_mib": "GPU step MiB"}
"""Columns that only some runs have."""


def markdown(results: dict[str, Any]) -> str:
    """All settings in one table, and whether ours reached what it was to reach."""
    first = results["settings"][0]
    extra = [(name, head) for name, head in EXTRAS.items() if name in first["rows"][0]]
    heads = ["setting", "", "median ms", "/ floor", SAME, AS_USED, "saved MiB", *(head for _, head in extra), "target"]
    lines = [
        f"One training step, forward and backward: {details(first['setting'])}. Floor, ours and PEFT stand here with "
        "our loss (the output head at labelled positions only), and with the model's own loss. `/ floor` and `/ PEFT` "
        "compare with the row of the same loss; PEFT as used has the model's own.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * (len(heads) - 3) + "---|",
    ]
    for figures in results["settings"]:
        for number, row in enumerate(figures["rows"]):
            cells = [
                title(figures["setting"]) if number == 0 else "",
                row["name"],
                f"{row['median_ms']:.0f}",
                f"{row['/ floor']:.2f}",
                f"{row[SAME]:.2f}",
                f"{row[AS_USED]:.2f}",
                f"{row['saved_mib']:.0f}",
                *(f"{row[name]:.0f}" for name, _ in extra),
                verdict(figures, row["name"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Measured on {results['machine']}."]) + "\n"


def verdict(figures: Figures, name: str) -> str:
    """Return each target of one row, with its figure and whether the target is met."""
    rows = {row["name"]: row for row in figures["rows"]}
    reached = rows[name] | {MEMORY: rows[name]["saved_mib"] / rows[PEFT]["saved_mib"]}
    return "; ".join(
        f"{name} ≤ {bound:.2f}: {'met' if reached[name] <= bound else 'missed'} ({reached[name]:.2f})"
        for name, bound in figures["targets"].get(name, {}).items()
    )


if __name__ == "__main__":
    main()
