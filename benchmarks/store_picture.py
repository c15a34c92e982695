"""The picture of `benchmarks.store`: hits by how many adapters the model holds, times by how many are registered."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning_picture import GREY, save_png

SERIES = {
    "miss_ms": ("miss: read, checked, put into the model", "#D55E00"),
    "forward_ms": ("forward of 16 tokens", "#0072B2"),
    "hit_ms": ("hit", "#009E73"),
}


def draw(measured: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure: Any = plt.figure(figsize=(11, 4.4))
    figure.text(0.02, 0.93, "Thousands of adapters registered, few in the model", fontsize=14, weight="bold")
    text = f"{measured['requests']:,} requests by Zipf's law, s = {measured['zipf']:g}; medians."
    figure.text(0.02, 0.875, text, color=GREY)
    grid = figure.add_gridspec(1, 2, top=0.76, bottom=0.17, left=0.07, right=0.97, wspace=0.25)
    _hits(figure.add_subplot(grid[0]), measured)
    _growth(figure.add_subplot(grid[1]), measured["growth"])
    figure.text(0.02, 0.02, f"Measured on {measured['machine']}.", color=GREY, fontsize=8)
    save_png(figure, path)
    plt.close(figure)


def _hits(axes: Axes, measured: dict[str, Any]) -> None:
    runs = measured["runs"]
    bars = axes.bar([str(one["loaded"]) for one in runs], [100 * one["hit_rate"] for one in runs], 0.5, color="#0072B2")
    axes.bar_label(bars, [f"{one['hit_rate']:.0%}" for one in runs])
    axes.set_title(f"Hits, {measured['registered']:,} registered", loc="left", fontsize=10)
    axes.set_xlabel("adapters in the model at most")
    axes.set_ylabel("% of requests")
    axes.set_ylim(0, 100)


def _growth(axes: Axes, growth: list[dict[str, Any]]) -> None:
    counts = [one["registered"] for one in growth]
    for key, (label, colour) in SERIES.items():
        values = [one[key] for one in growth]
        axes.plot(counts, values, color=colour, marker="o", ms=5)
        axes.annotate(label, (counts[-1], values[-1]), (0, 7), textcoords="offset points", ha="right", color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_title(f"Time of each, {growth[0]['loaded']} in the model at most", loc="left", fontsize=10)
    axes.set_xlabel("adapters registered")
    axes.set_ylabel("ms")
