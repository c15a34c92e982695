"""The picture of `benchmarks.epoch`: training loss against wall-clock seconds, a panel for each mode."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning_picture import COLOURS, GREY, save_png

TITLES = {"same": "The same batches in the same order", "default": "Each as it does it by default"}


def draw(modes: dict[str, Any], path: Path) -> None:
    """modes: {"same" or "default": what `benchmarks.epoch` measured}; writes a PNG."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, len(modes), figsize=(8 * len(modes), 5.6), squeeze=False)
    for axes, (mode, measured) in zip(panels.flat, modes.items(), strict=True):
        draw_mode(axes, mode, measured)
    notes = {measured["machine"] for measured in modes.values()}
    lines = [textwrap.fill(f"Measured on {note}.", 135 * len(modes)) for note in sorted(notes)]
    figure.text(0.01, 0.012, "\n".join(lines), color=GREY, fontsize=7.5)
    figure.subplots_adjust(left=0.09 / len(modes), right=0.98, top=0.86, bottom=0.17, wspace=0.14)
    save_png(figure, path)
    plt.close(figure)


def draw_mode(axes: Axes, mode: str, measured: dict[str, Any]) -> None:
    settings = measured["settings"]
    axes.set_title(TITLES[mode], loc="left", fontsize=13, weight="bold", pad=22)
    note = f"{settings['rows']} docstring rows, SmolLM2-135M, LoRA r 16, bf16, dropout {settings['dropout']:g}"
    axes.text(0, 1.025, note, transform=axes.transAxes, color=GREY)
    window = max(1, measured["sides"][0]["steps"] // 12)
    for colour, side in zip(COLOURS, measured["sides"], strict=False):
        seconds, losses = side["curve"]["seconds"], side["curve"]["losses"]
        smooth = running_mean(losses, window)
        label = f"{side['side']}: {side['seconds']:.0f} s, held-out loss {side['held_out_loss']:.3f}"
        axes.plot(seconds, losses, color=colour, lw=0.7, alpha=0.3)
        axes.plot(seconds, smooth, color=colour, lw=2, label=label)
        axes.plot(seconds[-1], smooth[-1], "o", color=colour, ms=5)
        axes.axvline(seconds[-1], color=colour, lw=0.8, ls=":")
    axes.set_xlim(0, None)
    axes.set_xlabel("seconds of train()")
    axes.set_ylabel(f"training loss, nats per supervised token (bold: mean of {window} steps)")
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper right")


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and those before it, `window` at most."""
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - window) : end])]
