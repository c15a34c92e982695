"""What an adapter costs beside training: adding, loading, switching, saving, merging; ours and HF PEFT, interleaved.

    python -m benchmarks.lifecycle               # about five minutes: table, results/lifecycle.md, .json and .png
    python -m benchmarks.lifecycle --draw        # the picture alone, from the figures of the last run

LoRA (r = 8) on all linear layers of a Llama of 80 blocks that is 64 wide: 560 adapted layers and next to no
arithmetic. Merging is measured on SmolLM2-135M in bf16 too (--base, or its shape with random weights). Nothing that
ours does may cost more with more adapters loaded, so the last column compares it with two of them.
"""

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

from benchmarks.lifecycle_picture import draw
from benchmarks.lifecycle_rounds import measure

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = parse()
    figures = options.folder / "lifecycle.json"
    if options.draw:
        measured = json.loads(figures.read_text(encoding="utf-8"))
    else:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        measured = measure(options)
        options.folder.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        (options.folder / "lifecycle.md").write_text(table(measured), encoding="utf-8")
        print(table(measured))
    draw(measured, options.folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.lifecycle", description=str(__doc__).partition("\n")[0])
    default = Path("artifacts/base")
    parser.add_argument("--base", type=Path, default=default if default.is_dir() else None, help="model to merge into")
    parser.add_argument("--blocks", type=int, default=80, help="of the wide but thin Llama")
    parser.add_argument("--points", type=_counts, default=[2, 10, 20, 50], help="adapters loaded, parted by commas")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, at least 7")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--draw", action="store_true", help="draw the last run's figures again; measure nothing")
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 7")
    return options


def _counts(text: str) -> list[int]:
    counts = sorted({int(part) for part in text.split(",")})
    if len(counts) < 2 or counts[0] != 2:
        raise argparse.ArgumentTypeError("two counts or more, and the least of them 2")
    return counts


# -- report ------------------------------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> str:
    """Markdown; ratio and growth are medians over the rounds of the ratio within a round."""
    lines = [
        f"LoRA on {measured['layers']} linear layers of a thin Llama; medians of {len(measured['rows'][0]['ours'])} "
        "rounds. Growth: ours against ours with 2 adapters in the same round.",
        "",
        "| operation | adapters loaded | ours, ms | PEFT, ms | ours / PEFT | growth |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    order = list(dict.fromkeys(row["operation"] for row in measured["rows"]))
    for row in sorted(measured["rows"], key=lambda row: (order.index(row["operation"]), row["loaded"])):
        ours, theirs = statistics.median(row["ours"]), statistics.median(row["peft"])
        growth = f"{ratio(row, 'few'):.2f}" if row["loaded"] > 2 else ""
        figures = " | ".join(map(number, (ours, theirs, ratio(row, "peft"))))
        lines.append(f"| {row['operation']} | {row['loaded'] or ''} | {figures} | {growth} |")
    return "\n".join([*lines, "", f"Measured on {measured['machine']}."]) + "\n"


def ratio(row: dict[str, Any], other: str) -> float:
    """Of ours to another side of the same rounds."""
    return statistics.median(mine / its for mine, its in zip(row["ours"], row[other], strict=True))


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
