"""The picture of `benchmarks.precision`: loss by step, each precision's distance from the first, memory and time."""

import statistics
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning_picture import COLOURS, GREY, save_png

GIB = 2**30


def draw(measured: dict[str, Any], path: Path) -> None:
    """measured: what `benchmarks.precision` measured; writes a PNG."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 6.2))
    grid = figure.add_gridspec(
        2, 3, width_ratios=(2.6, 1, 1), left=0.085, right=0.98, top=0.88, bottom=0.13, wspace=0.28, hspace=0.32
    )
    sides, settings = measured["sides"], measured["settings"]
    losses, apart = (figure.add_subplot(grid[row, 0]) for row in (0, 1))
    draw_losses(losses, sides)
    draw_distances(apart, sides)
    memory = [side["peak_memory"] / GIB for side in sides]
    seconds = [statistics.median(side["seconds"]) for side in sides]
    draw_bars(figure.add_subplot(grid[:, 1]), sides, memory, "peak memory, GiB", "{:.2f}")
    draw_bars(figure.add_subplot(grid[:, 2]), sides, seconds, "seconds a step (median)", "{:.2f}")
    figure.text(0.085, 0.955, "One training in each precision of the frozen base", fontsize=13, weight="bold")
    note = f"SmolLM2-135M, LoRA r 16 in float32, {settings['steps']} steps of {settings['batch']} docstring rows"
    figure.text(0.085, 0.925, f"{note}, the same batches", color=GREY)
    figure.text(0.01, 0.012, textwrap.fill(f"Measured on {measured['machine']}.", 170), color=GREY, fontsize=7.5)
    save_png(figure, path)
    plt.close(figure)


def draw_losses(axes: Axes, sides: list[dict[str, Any]]) -> None:
    for colour, side in zip(COLOURS, sides, strict=False):
        label = f"{side['precision']}: held-out {side['held_out_loss']:.3f}"
        axes.plot(range(1, len(side["losses"]) + 1), side["losses"], color=colour, lw=1.4, alpha=0.85, label=label)
    axes.set_ylabel("training loss, nats a token")
    axes.legend(frameon=False, loc="upper right")
    finish(axes)


def draw_distances(axes: Axes, sides: list[dict[str, Any]]) -> None:
    first = sides[0]
    for colour, side in list(zip(COLOURS, sides, strict=False))[1:]:
        apart = [a - b for a, b in zip(side["losses"], first["losses"], strict=True)]
        axes.plot(range(1, len(apart) + 1), apart, color=colour, lw=1.4)
    axes.axhline(0, color=COLOURS[0], lw=1)
    axes.set_ylabel(f"minus that of {first['precision']}")
    axes.set_xlabel("optimiser step")
    finish(axes)


def draw_bars(axes: Axes, sides: list[dict[str, Any]], heights: list[float], title: str, form: str) -> None:
    bars = axes.bar([side["precision"].replace(", ", ",\n") for side in sides], heights, color=COLOURS[: len(sides)])
    axes.bar_label(bars, [form.format(height) for height in heights], padding=2)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def finish(axes: Axes) -> None:
    axes.set_xlim(0, None)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
