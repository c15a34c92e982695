"""The picture of `benchmarks.lifecycle`: what grows with the number of adapters loaded, and what does not."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.learning_picture import GREY, save_png
from benchmarks.lifecycle_rounds import DISABLE, LOAD

OURS, THEIRS = "#0072B2", "#D55E00"
PANELS = (
    (LOAD, "Loading one more adapter from disk"),
    (DISABLE, "disable_adapter: into the context and out of it"),
)

NOTE = (
    "Lines: medians, bars from the fastest to the slowest round. Dots: each single load of ours; a high one met a full "
    "collection of Python's garbage, PEFT's objects included."
)


def draw(measured: dict[str, Any], folder: Path) -> None:
    """Write lifecycle.png."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure: Any = plt.figure(figsize=(12, 5.6))
    figure.text(0.02, 0.945, "What an adapter costs when others are loaded already", fontsize=14, weight="bold")
    figure.text(0.02, 0.905, f"LoRA on {measured['layers']} linear layers. Both axes are logarithmic; lower is better.",
                fontsize=9.5, color=GREY)  # fmt: skip
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.065, right=0.93, top=0.83, bottom=0.15, wspace=0.42)
    for axes, (operation, title) in zip((left, right), PANELS, strict=True):
        every = measured["ours_at_every_count"] if axes is left else []
        draw_panel(axes, [row for row in measured["rows"] if row["operation"] == operation], every)
        axes.set_title(title, loc="left", fontsize=10.5, weight="bold")
    figure.text(0.02, 0.02, f"{NOTE}\nMeasured on {measured['machine']}.", color=GREY, fontsize=8)
    save_png(figure, folder / "lifecycle.png")
    plt.close(figure)


def draw_panel(axes: Axes, rows: list[dict[str, Any]], every: list[tuple[int, float]]) -> None:
    """Medians with the range of the rounds, each single load of ours, and what growth in proportion would be."""
    rows = sorted(rows, key=lambda row: row["loaded"])
    counts = [row["loaded"] for row in rows]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([n for n, _ in every], [ms for _, ms in every], ".", color=OURS, ms=4, alpha=0.45)
    for side, colour, name in (("peft", THEIRS, "HF PEFT"), ("ours", OURS, "peftcore")):
        medians = [statistics.median(row[side]) for row in rows]
        ends = [[m - min(row[side]) for m, row in zip(medians, rows, strict=True)],
                [max(row[side]) - m for m, row in zip(medians, rows, strict=True)]]  # fmt: skip
        axes.errorbar(counts, medians, yerr=ends, color=colour, marker="o", ms=5, lw=1.6, elinewidth=0.8)
        label(axes, counts[-1], medians[-1], name, colour)
    start = statistics.median(rows[0]["ours"])
    axes.plot(counts, [start * n / counts[0] for n in counts], color=GREY, lw=1, ls=":")
    label(axes, counts[-1], start * counts[-1] / counts[0], "in proportion", GREY)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("adapters loaded (log scale)")
    axes.set_ylabel("milliseconds (log scale)")
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)


def label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), (7, 0), textcoords="offset points", color=colour, va="center", annotation_clip=False)
