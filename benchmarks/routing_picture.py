"""The picture of `benchmarks.routing`: cases as bars, multiples of the bare base, and how decoding grows."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning_picture import GREY, save_png

OURS, THEIRS = "#0072B2", "#D55E00"


def draw(measured: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    axes_of = list(measured["growth"])
    figure: Any = plt.figure(figsize=(12, 7.4 if axes_of else 4.2))
    figure.text(0.02, 0.955, "A batch whose rows have different adapters", fontsize=14, weight="bold")
    figure.text(0.02, 0.925, "Time of a forward as a multiple of the bare base's; lower is better.", color=GREY)
    grid = figure.add_gridspec(2 if axes_of else 1, max(len(axes_of), 1), top=0.86, bottom=0.1, left=0.06, right=0.97)
    grid.update(hspace=0.5, wspace=0.28)
    _cases(figure.add_subplot(grid[0, :]), measured["cases"])
    for number, axis in enumerate(axes_of):
        _growth(figure.add_subplot(grid[1, number]), axis, measured["growth"][axis])
    figure.text(0.02, 0.015, f"Measured on {measured['machine']}.", color=GREY, fontsize=8)
    save_png(figure, path)
    plt.close(figure)


def _cases(axes: Axes, cases: dict[str, Any]) -> None:
    for shift, side, colour, name in ((-0.2, "ours", OURS, "peftcore"), (0.2, "PEFT", THEIRS, "HF PEFT")):
        values = [found.get(side, {}).get("floor", 0.0) for found in cases.values()]
        if any(values):
            bars = axes.bar([x + shift for x in range(len(values))], values, 0.38, color=colour, label=name)
            axes.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], fontsize=7.5)
    axes.axhline(1, color=GREY, lw=1, ls=":")
    axes.set_xticks(range(len(cases)), [_wrapped(key) for key in cases], fontsize=7.5)
    axes.set_ylabel("times the bare base")
    axes.legend(frameon=False, loc="upper right")


def _wrapped(key: str) -> str:
    mode, rest = key.split(" ", 1)
    case, dtype = rest.rsplit(" ", 1)
    return f"{mode}\n{case}\n{dtype}"


def _growth(axes: Axes, axis: str, points: dict[str, Any]) -> None:
    counts = [int(point) for point in points]
    axes.plot(counts, [found["ours"]["floor"] for found in points.values()], color=OURS, marker="o", ms=5)
    axes.axhline(1, color=GREY, lw=1, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0.9)
    axes.set_xlabel(f"{axis} (log scale)")
    axes.set_ylabel("times the bare base")
    axes.set_title(f"bf16 decoding by {axis}", loc="left", fontsize=10, weight="bold")
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
