"""The picture of `benchmarks.auto_rank`: which layers get which rank, and what it brings against one rank for all."""

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.auto_rank_cells import ADALORA, AUTO, DOCSTRINGS, MODULES, RANK
from benchmarks.cells import machines
from benchmarks.learning_picture import COLOURS, GREY, save_png

TASKS = {DOCSTRINGS: "docstrings", MODULES: "package of a function"}
ARMS = {AUTO: "find_ranks", ADALORA: "AdaLoRA"}
COLOUR_OF = {AUTO: COLOURS[0], ADALORA: COLOURS[1]}


def draw(measured: dict[str, Any], path: Path) -> None:
    """Write a PNG; nothing where no cell has ranks of its own yet."""
    maps = [
        (task, arm, own)
        for task in TASKS
        for arm in ARMS
        if (own := [c["ranks"] for name, c in measured["cells"].items() if name.startswith(f"{task}-{arm}-")])
    ]
    if not maps:
        return
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure: Any = plt.figure(figsize=(15, 1.1 + 2.1 * len(maps)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.6, 1))
    panels = left.subplots(len(maps), 1, squeeze=False).flat
    image = None
    for axes, (task, arm, ranks) in zip(panels, maps, strict=True):
        image = draw_ranks(axes, ranks)
        axes.set_title(f"{ARMS[arm]}, {TASKS[task]}: mean rank of {len(ranks)} seeds", loc="left", weight="bold")
    left.colorbar(image, ax=list(left.axes), shrink=0.5, label="rank", ticks=[0, 8, RANK, 24, 32], pad=0.01)
    if measured["comparisons"]:
        draw_differences(right, measured["comparisons"])
    left.supxlabel(f"Measured on {machines(measured['cells'])}.", color=GREY, fontsize=7.5, ha="left", x=0.01)
    save_png(figure, path)
    plt.close(figure)


def draw_ranks(axes: Axes, ranks: list[dict[str, int]]) -> Any:
    """Modules by blocks; white is the rank that fixed LoRA has everywhere."""
    paths = list(ranks[0])
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    blocks = 1 + max(block_of(path) for path in paths)
    grid = np.zeros((len(names), blocks))
    for path in {path for own in ranks for path in own}:
        mean = np.mean([own.get(path, 0) for own in ranks])
        grid[names.index(path.rpartition(".")[2]), block_of(path)] = mean
    image = axes.imshow(grid, cmap="RdBu_r", vmin=0, vmax=2 * RANK, aspect="auto")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(0, blocks, 5))
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    return image


def block_of(path: str) -> int:
    """The number in a path."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found[1]) if found else 0


def draw_differences(part: Any, comparisons: list[dict[str, Any]]) -> None:
    """Each comparison's mean, seeds, and both intervals."""
    axes = part.subplots()
    axes.axvline(0, color="#333333", lw=1)
    for row, one in enumerate(comparisons[::-1]):
        colour = COLOUR_OF[one["arm"]]
        for key, shift, width in (("over_seeds", 0.1, 3.2), ("over_rows", -0.1, 1.4)):
            axes.plot(one[key], [row + shift] * 2, color=colour, lw=width, solid_capstyle="butt")
        axes.plot(one["by_seed"], [row + 0.25] * len(one["by_seed"]), "o", color=colour, ms=3.5, alpha=0.6)
        axes.plot(one["difference"], row, "D", color=colour, ms=7)
        axes.annotate(
            f"{one['difference']:+.3f}", (one["difference"], row), (0, -32), textcoords="offset points", ha="center"
        )
    axes.set_yticks(
        range(len(comparisons)), [f"{ARMS[one['arm']]},\n{TASKS[one['task']]}" for one in comparisons[::-1]]
    )
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    axes.set_xlabel("held-out loss minus that of one rank for all (nats; left is better)")
    axes.set_title("Against LoRA of rank 16", loc="left", weight="bold", fontsize=12)
    axes.text(
        0,
        -0.13,
        "diamond: mean; dots: seeds; 95 % over seeds (thick)\nand over held-out rows (thin). "
        "find_ranks keeps as many\nparameters, AdaLoRA as many triplets",
        transform=axes.transAxes,
        color=GREY,
        fontsize=8,
    )
    axes.grid(axis="x", color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
