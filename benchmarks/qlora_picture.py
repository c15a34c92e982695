"""The picture of `benchmarks.qlora`: perplexities on the left, differences to 16-bit LoRA on the right."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks.cells import machines
from benchmarks.learning_picture import COLOURS, GREY, save_png

ABOVE, BELOW = 0.12, -0.12
"""Where the two intervals of an arm stand beside its line."""


def draw(measured: dict[str, Any], path: Path) -> None:
    """Write a PNG."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), width_ratios=(1.15, 1))
    draw_perplexities(left, measured)
    draw_differences(right, measured)
    note = textwrap.shorten(f"Measured on {machines(measured['cells'])}.", 210, placeholder=" ...")
    figure.text(0.01, 0.015, note, color=GREY, fontsize=7.5)
    figure.subplots_adjust(left=0.1, right=0.985, top=0.84, bottom=0.17, wspace=0.32)
    save_png(figure, path)
    plt.close(figure)


def draw_perplexities(axes: Axes, measured: dict[str, Any]) -> None:
    settings, titles = measured["settings"], measured["titles"]
    arms = [arm for arm, found in measured["summary"].items() if found["untrained"] or found["trained"]][::-1]
    _headline(
        axes,
        "Held-out perplexity",
        f"{settings['test_rows']} docstring rows; SmolLM2-135M, LoRA r {settings['rank']}, "
        f"{settings['train_rows']} rows of training, one dot a seed",
    )
    for row, arm in enumerate(arms):
        found = measured["summary"][arm]
        if found["untrained"]:
            axes.plot(found["untrained"], row, "o", color=GREY, ms=7, label="untrained" if row == 0 else None)
            axes.annotate(f"{found['untrained']:.1f}", (found["untrained"], row), (0, 8), **_OVER, color=GREY)
        if found["trained"]:
            mean = sum(found["trained"]) / len(found["trained"])
            axes.plot(found["trained"], [row] * len(found["trained"]), "o", color=COLOURS[0], ms=6, alpha=0.6)
            axes.plot(
                mean, row, "|", color=COLOURS[0], ms=18, mew=2, label="trained, mean" if row == len(arms) - 1 else None
            )
            axes.annotate(f"{mean:.2f}", (mean, row), (0, 11), **_OVER, color=COLOURS[0], weight="bold")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([t for t in (10, 15, 20, 30, 40, 60, 80, 100, 150, 200) if _within(t, measured)])
    axes.set_xlabel("perplexity (log scale), lower is better")
    axes.set_yticks(range(len(arms)), [titles[arm] for arm in arms])
    axes.set_ylim(-0.6, len(arms) - 0.3)
    axes.grid(axis="x", color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.02, 1.05), ncols=2, markerscale=0.7)


_OVER: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5}


def _within(tick: float, measured: dict[str, Any]) -> bool:
    summary = measured["summary"].values()
    values = [value for found in summary for value in (found["untrained"], *found["trained"]) if value]
    return bool(values) and 0.9 * min(values) <= tick <= 1.1 * max(values)


def draw_differences(axes: Axes, measured: dict[str, Any]) -> None:
    margin, found = measured["margin"], measured["comparisons"][::-1]
    _headline(axes, "Against 16-bit LoRA", "difference of the held-out loss, paired by seed and row; 95 % intervals")
    axes.axvspan(-margin, margin, color="#e9f2f8", zorder=0, label=f"margin: {margin} nats")
    axes.axvline(0, color=GREY, lw=0.8)
    for row, one in enumerate(found):
        for interval, place, colour, name in (
            (one["over_seeds"], ABOVE, COLOURS[1], f"over {len(one['by_seed'])} seeds"),
            (one["over_rows"], BELOW, COLOURS[0], "over rows"),
        ):
            axes.plot(interval, [row + place] * 2, color=colour, lw=2.4, label=name if row == 0 else None)
        axes.plot(one["difference"], row, "D", color="#333333", ms=5)
        axes.plot(one["by_seed"], [row + ABOVE] * len(one["by_seed"]), "o", color=COLOURS[1], ms=3.5)
        text = f"{one['difference']:+.4f}: {one['verdict']}"
        axes.annotate(text, (one["difference"], row), (0, 16), **_OVER, weight="bold")
    axes.set_yticks(range(len(found)), [measured["titles"][one["arm"]] for one in found])
    axes.set_ylim(-0.8, max(len(found), 1) - 0.3)
    axes.set_xlabel("nats a token, negative is better than 16-bit LoRA")
    axes.grid(axis="x", color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right", fontsize=8, ncols=3)


def _headline(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, weight="bold", pad=22)
    axes.text(0, 1.025, note, transform=axes.transAxes, color=GREY, fontsize=8.5)
