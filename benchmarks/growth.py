"""How the cost of a training step grows with rank, sequence length and number of adapted layers.

    python -m benchmarks.growth            # results/growth.md, .json and .png
    python -m benchmarks.growth --draw     # the picture again from the last figures

One forward and backward of the floor, ours and HF PEFT, interleaved, as in `benchmarks.train_step`, on SmolLM2-135M's
shape with random weights: --blocks blocks for rank and length, all 30 for the number of layers. bf16, batch of 2.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
from tqdm import tqdm

from benchmarks.growth_picture import draw
from benchmarks.machine import machine
from benchmarks.steps import (
    FLOOR,
    LLAMA_LINEARS,
    OURS,
    PEFT,
    Setting,
    build,
    check_equal,
    make_batch,
    measure,
    quiet,
    random_base,
    release,
)

RESULTS = Path(__file__).parent / "results"
RANKS = [4, 8, 16, 32, 64, 128, 256]
LENGTHS = [64, 128, 256, 512, 1024, 2048]
ADAPTED_BLOCKS = [1, 5, 10, 20, 30]
ROWS = [FLOOR, OURS, PEFT]

Point = tuple[str, int, Setting]
"""A panel, the place on its axis and what is measured there."""


def main() -> None:
    options = parse()
    quiet()
    figures = options.folder / "growth.json"
    if options.draw:
        measured = json.loads(figures.read_text(encoding="utf-8"))
    else:
        measured = measure_all(options)
        options.folder.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    text = table(measured)
    (options.folder / "growth.md").write_text(text, encoding="utf-8")
    draw(measured, options.folder / "growth.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, help="of the base, for rank and length")
    parser.add_argument("--deep-blocks", type=int, default=max(ADAPTED_BLOCKS), help="of the base, for the layers")
    parser.add_argument("--ranks", type=_integers, default=RANKS, help="parted by commas")
    parser.add_argument("--lengths", type=_integers, default=LENGTHS, help="tokens a row, parted by commas")
    parser.add_argument("--adapted", type=_integers, default=ADAPTED_BLOCKS, help="adapted blocks, parted by commas")
    parser.add_argument("--length", type=int, default=256, help="tokens a row, for rank and layers")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, at least 7")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--draw", action="store_true", help="write table and picture again; measure nothing")
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error(f"--repeats: a median of {options.repeats} says little; give at least 7")
    if max(options.adapted) > options.deep_blocks:
        parser.error(f"--adapted: the base has {options.deep_blocks} blocks; give --deep-blocks {max(options.adapted)}")
    return options


def _integers(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


# -- measuring ---------------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        points = list(points_of(options, scratch))
        panels: dict[str, list[dict[str, Any]]] = {}
        bar = tqdm(points, unit="point", disable=None)
        for number, (panel, place, setting) in enumerate(bar):
            bar.set_postfix_str(f"{panel} {place}")
            panels.setdefault(panel, []).append(measure_point(place, setting, scratch / str(number), options.repeats))
    return {
        "settings": {name: getattr(options, name) for name in ("blocks", "deep_blocks", "length", "batch", "dropout")}
        | {"repeats": options.repeats, "rank": 16, "dtype": "bf16"},
        "panels": panels,
        "machine": f"{machine()}, peft {peft.__version__}",
    }


def points_of(options: argparse.Namespace, scratch: Path) -> Iterator[Point]:
    flat = random_base(scratch / "flat", options.blocks)
    deep = random_base(scratch / "deep", options.deep_blocks)
    plain = Setting(folder=flat, batch=options.batch, length=options.length, dropout=options.dropout)
    for rank in options.ranks:
        yield "rank", rank, replace(plain, rank=rank)
    for length in options.lengths:
        yield "length", length, replace(plain, length=length)
    for blocks in options.adapted:  # the first ones, so that the gradient passes the whole depth, as the floor's does
        yield "layers", blocks * len(LLAMA_LINEARS), replace(plain, folder=deep, blocks=blocks)


def measure_point(place: int, setting: Setting, scratch: Path, repeats: int) -> dict[str, Any]:
    """Median and single milliseconds of each row at one place of an axis."""
    check_equal(setting, scratch / "check")
    release(setting.device)
    rows = [row for row in build(setting, scratch / "adapter") if row.name in ROWS]
    measure(rows, make_batch(rows[0].model, setting)[1], repeats)
    point = {
        "at": place,
        "median_ms": {row.name: 1e3 * statistics.median(row.seconds) for row in rows},
        "all_ms": {row.name: [round(1e3 * seconds, 2) for seconds in row.seconds] for row in rows},
    }
    del rows
    release(setting.device)
    return point


# -- table -------------------------------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> str:
    """Markdown: a table for each panel, and how much the cost grew from its first place to its last."""
    settings = measured["settings"]
    heads = {
        "rank": f"rank ({settings['blocks']} blocks, {settings['batch']} x {settings['length']} tokens)",
        "length": f"tokens a row ({settings['blocks']} blocks, {settings['batch']} rows, r {settings['rank']})",
        "layers": f"adapted layers of {settings['deep_blocks'] * len(LLAMA_LINEARS)} "
        f"({settings['batch']} x {settings['length']} tokens, r {settings['rank']})",
    }
    lines = [
        f"Milliseconds of one forward and backward, {settings['dtype']}, dropout {settings['dropout']:g}, median of "
        f"{settings['repeats']} interleaved rounds. Ours and the floor have our loss, PEFT the model's own.",
    ]
    for panel, points in measured["panels"].items():
        lines += ["", f"| {heads[panel]} | floor | ours | PEFT | ours / floor | ours / PEFT |"]
        lines.append("|---:|---:|---:|---:|---:|---:|")
        for point in points:
            floor, ours, theirs = (point["median_ms"][name] for name in ROWS)
            lines.append(
                f"| {point['at']} | {floor:.0f} | {ours:.0f} | {theirs:.0f} | {ours / floor:.2f} "
                f"| {ours / theirs:.2f} |"
            )
        first, last = points[0], points[-1]
        if last["at"] > first["at"]:
            grown = ", ".join(f"{name} {last['median_ms'][name] / first['median_ms'][name]:.1f}x" for name in ROWS)
            lines += ["", f"From {first['at']} to {last['at']}, {last['at'] / first['at']:g}x: {grown}."]
    return "\n".join([*lines, "", f"Measured on {measured['machine']}."]) + "\n"


if __name__ == "__main__":
    main()
