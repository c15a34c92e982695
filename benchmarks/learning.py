"""Every method on one tiny real task: held-out loss by trainable parameters, and by seconds of training.

    python -m benchmarks.learning                # train every row, then write table, figures and picture
    python -m benchmarks.learning --only LoRA,OFT --folder /tmp/some
    python -m benchmarks.learning --draw         # the picture alone, from the figures of the last run

The task and the rows are those of tests/peftcore/test_learning.py: a tiny Llama that reads upright digits must learn
transposed ones, with everything but the adapter frozen. It runs on one thread, the model being too small for two.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/peftcore/support"))

from digits import base, judge
from digits_rows import ROWS, Row, learn

from benchmarks.learning_picture import draw
from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results"
EVERY = 5
"""Steps from one point of a curve to the next."""


def main() -> None:
    options = parse()
    figures = options.folder / "learning.json"
    if options.draw:
        measured = json.loads(figures.read_text(encoding="utf-8"))
    else:
        measured = measure([row for row in ROWS if row.name in options.only])
        options.folder.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        (options.folder / "learning.md").write_text(table(measured), encoding="utf-8")
        print(table(measured))
    draw(measured, options.folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.learning", description=str(__doc__).partition("\n")[0])
    names = [row.name for row in ROWS]
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help="rows, parted by commas")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--draw", action="store_true", help="draw the last run's figures again; train nothing")
    options = parser.parse_args()
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: no row is named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def measure(rows: list[Row]) -> dict[str, Any]:
    """Train each row on its own copy of the base."""
    torch.set_num_threads(1)
    untouched, _ = judge(base())
    measured = []
    for row in (bar := tqdm(rows, unit="method")):
        bar.set_postfix_str(row.name)
        measured.append(measure_row(row))
    return {"machine": machine(), "base_loss": untouched, "rows": measured}


def measure_row(row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        curve = learn(row, Path(scratch), EVERY)
    return {
        "name": row.name,
        "method": row.method,
        "family": row.family,
        "trainable": curve.trainable,
        "steps": row.steps,
        "seconds_per_step": curve.seconds[-1] / row.steps,
        "loss_before": curve.losses[0],
        "loss_after": curve.losses[-1],
        "accuracy": curve.accuracy,
        "curve": {
            "seconds": [round(value, 4) for value in curve.seconds],
            "losses": [round(value, 4) for value in curve.losses],
        },
    }


def table(measured: dict[str, Any]) -> str:
    """Markdown, the lowest loss first."""
    lines = [
        f"Transposed digits, held-out loss in nats; the base alone has {measured['base_loss']:.2f}, and a model that "
        "says it knows nothing 2.30.",
        "",
        "| method | trainable parameters | steps | ms / step | loss before | loss after | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(measured["rows"], key=lambda row: row["loss_after"]):
        lines.append(
            f"| {row['name']} | {row['trainable']:,} | {row['steps']} | {1e3 * row['seconds_per_step']:.0f} "
            f"| {row['loss_before']:.2f} | {row['loss_after']:.2f} | {row['accuracy']:.0%} |"
        )
    return "\n".join([*lines, "", f"Measured on {measured['machine']}."]) + "\n"


if __name__ == "__main__":
    main()
