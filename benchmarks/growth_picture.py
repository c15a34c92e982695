"""The picture of `benchmarks.growth`: a panel each for rank, sequence length and adapted layers."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from benchmarks.learning_picture import COLOURS, GREY, save_png

FLOOR, OURS, PEFT = "floor", "ours", "PEFT"
STYLES = {FLOOR: (GREY, "--"), OURS: (COLOURS[0], "-"), PEFT: (COLOURS[1], "-")}
XLABELS = {"rank": "rank (log scale)", "length": "tokens a row (log scale)", "layers": "adapted layers"}
TITLES = {"rank": "Rank", "length": "Sequence length", "layers": "Adapted layers"}


def draw(measured: dict[str, Any], path: Path) -> None:
    """Write a PNG."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    panels = measured["panels"]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 5.4), squeeze=False)
    for axes, (panel, points) in zip(all_axes.flat, panels.items(), strict=True):
        draw_panel(axes, panel, points, measured["settings"])
    all_axes.flat[0].set_ylabel("milliseconds of one forward and backward")
    figure.text(0.008, 0.015, f"Measured on {measured['machine']}.", color=GREY, fontsize=8)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.86, bottom=0.15, wspace=0.17)
    save_png(figure, path)
    plt.close(figure)


def draw_panel(axes: Axes, panel: str, points: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    blocks = settings["deep_blocks"] if panel == "layers" else settings["blocks"]
    shape = f"{settings['batch']} rows" if panel == "length" else f"{settings['batch']} x {settings['length']} tokens"
    rank = "" if panel == "rank" else f", r {settings['rank']}"
    axes.set_title(TITLES[panel], loc="left", fontsize=13, weight="bold", pad=22)
    note = f"{blocks} blocks of SmolLM2-135M's shape, {shape}{rank}, {settings['dtype']}"
    axes.text(0, 1.025, note, transform=axes.transAxes, color=GREY)
    places = [point["at"] for point in points]
    times = {name: [point["median_ms"][name] for point in points] for name in STYLES}
    (draw_linear if panel == "layers" else draw_log)(axes, places, times)
    axes.set_xlabel(XLABELS[panel])
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.legend(edgecolor="none", framealpha=1, loc="lower right" if panel == "layers" else "upper left")


def draw_log(axes: Axes, places: list[int], times: dict[str, list[float]]) -> None:
    """Both axes logarithmic; the dotted line doubles whenever its cause does, from ours at the first place."""
    for name, (colour, dash) in STYLES.items():
        axes.plot(places, times[name], dash, color=colour, marker="o", ms=4, lw=1.8, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    every = [value for values in times.values() for value in values]
    axes.set_ylim(0.8 * min(every), 1.5 * max(every))
    proportional = [times[OURS][0] * place / places[0] for place in places]
    axes.plot(places, proportional, ":", color="#333333", lw=1.2, label="proportional growth")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    ticks = [
        t for t in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if 0.8 * min(every) <= t <= 1.5 * max(every)
    ]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_linear(axes: Axes, places: list[int], times: dict[str, list[float]]) -> None:
    """Linear axes from 0, where nothing is adapted and the cost is the floor's; dotted: straight from there to ours."""
    floor = sum(times[FLOOR]) / len(times[FLOOR])
    for name in (OURS, PEFT):
        axes.plot(places, times[name], color=STYLES[name][0], marker="o", ms=4, lw=1.8, label=name)
    axes.plot([0, *places], [floor, *times[FLOOR]], "--", color=GREY, marker="o", ms=4, lw=1.8, label=FLOOR)
    axes.plot(
        [0, places[-1]],
        [floor, times[OURS][-1]],
        ":",
        color="#333333",
        lw=1.2,
        label="proportional growth on the floor",
    )
    axes.set_ylim(0, 1.25 * max(max(values) for values in times.values()))
    axes.set_xlim(0, None)
