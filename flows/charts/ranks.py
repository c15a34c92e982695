"""A heat map of the ranks of an adapter's layers, with the model's blocks as columns and kinds of modules as rows."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flows.charts.curves import ADAPTER, INK, LINE, SOFT, STYLE, svg

HEAT_MAP = "ranks.svg"
"""File name in the training's folder; the file exists if ranks differ between layers."""
_COLORS = LinearSegmentedColormap.from_list("rank", ["#f3f7f6", "#8cc5bd", ADAPTER, "#063b37"])
_NUMBERS_UP_TO = 40
"""Largest number of blocks at which cells show their rank as a number."""


@matplotlib.rc_context(STYLE)
def rank_heat_map(ranks: Mapping[str, int], title: str) -> Markup:
    """Draw ranks, {path of the layer: rank}, as one <svg> element; a layer outside the blocks has its own row."""
    return svg(_figure(ranks, title), title)


@matplotlib.rc_context(STYLE)
def rank_picture(ranks: Mapping[str, int], title: str) -> Any:
    """Draw ranks as an array of pixels, (height, width, 4), uint8."""
    canvas = FigureCanvasAgg(_figure(ranks, title))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _figure(ranks: Mapping[str, int], title: str) -> Figure:
    cells, kinds, blocks = _grid(ranks)
    figure = Figure(figsize=(max(4.5, 2.2 + 0.3 * len(blocks)), 1.5 + 0.33 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    top = max(ranks.values(), default=1)
    edges = [np.arange(-0.5, count) for count in (len(blocks), len(kinds))]
    mesh = axes.pcolormesh(*edges, cells, cmap=_COLORS, vmin=0, vmax=max(1, top), edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    if len(blocks) <= _NUMBERS_UP_TO:
        for row, column in zip(*np.nonzero(~np.isnan(cells)), strict=True):
            dark = cells[row, column] > 0.55 * top
            text = f"{cells[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(len(blocks)), blocks, fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("block")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=22)
    mean = sum(ranks.values()) / max(1, len(ranks))
    note = f"{len(ranks)} layers, {sum(ranks.values()):,} ranks in all, {mean:.1f} on average"
    axes.text(0, 1.0, note + "\n", transform=axes.transAxes, color=SOFT, fontsize=8.5, va="bottom", linespacing=0.4)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=14, label="rank", ticks=MaxNLocator(5, integer=True))
    bar.solids.set(rasterized=False, edgecolor="face")  # pyright: ignore[reportOptionalMemberAccess]
    bar.outline.set_edgecolor(LINE)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return figure


def _grid(ranks: Mapping[str, int]) -> tuple[Any, Sequence[str], Sequence[str]]:
    """Return ranks, (kinds, blocks), with NaN for missing layers, and the names of kinds and blocks."""
    places = {path: _place(path) for path in ranks}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    blocks = sorted({block for _, block in places.values()})
    cells = np.full((len(kinds), len(blocks)), np.nan)
    for path, (kind, block) in places.items():
        cells[kinds.index(kind), blocks.index(block)] = ranks[path]
    return cells, kinds, ["–" if block < 0 else str(block) for block in blocks]


def _place(path: str) -> tuple[str, int]:
    """Split a path into kind and block: "model.layers.3.self_attn.q_proj" gives ("self_attn.q_proj", 3).

    The block is -1 for a layer outside of the blocks.
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", path)
    return (match[2], int(match[1])) if match else (path, -1)
