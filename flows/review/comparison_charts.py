"""Charts of a comparison as SVG, small enough for phones. Each run has a colour, and with many runs a dash pattern.

The lines and points of run N are in groups whose ids begin with `run-N-`, so the page can show and hide a run.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flows.charts.curves import INK, LINE, SOFT, STYLE, bare, smoothed, svg
from flows.review.comparison import Comparison
from flows.review.run import number

COLORS = ("#0f766e", "#c2571a", "#4f5bd5", "#b8860b", "#9d3c8c", "#2f83c5", "#5f7a1f", "#8a4b3a")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
AXES = 8
"""Largest number of parameters with an axis in the parallel coordinates and with a scatter chart."""
TICKS = 7
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}
POINTS = 600
"""Largest number of points of a curve; a longer curve is thinned evenly after smoothing."""


def color(run: int) -> str:
    """Return the colour of a run."""
    return COLORS[run % len(COLORS)]


def dash(run: int) -> Any:
    """Return the dash pattern of a run."""
    return DASHES[run // len(COLORS) % len(DASHES)]


@matplotlib.rc_context(STYLE)
def curves(comparison: Comparison, kind: str) -> Markup | None:
    """Draw the loss of each run over its optimiser steps.

    Args:
        comparison: the compared runs.
        kind: the loss to draw: "training", which is smoothed, or "validation".

    Returns:
        The chart as SVG; None if no run has this loss.
    """
    lines = comparison.curve(kind)
    if not any(lines):
        return None
    figure = Figure(figsize=(5.4, 3.3), layout="constrained")
    axes = figure.subplots()
    # the best run is drawn last, on top
    for run, points in reversed(list(enumerate(lines))):
        steps, values = [step for step, _ in points], [value for _, value in points]
        look: dict[str, Any] = {"color": color(run), "linestyle": dash(run), "linewidth": _width(comparison, run)}
        if kind == "training":
            values = smoothed(values)
        elif len(points) <= 40:
            look |= {"marker": "o", "markersize": 4}
        every = max(1, math.ceil(len(steps) / POINTS))
        if steps:
            axes.plot(steps[::every], values[::every], gid=f"run-{run}-{kind}", **look)
    axes.set_title(f"{kind.capitalize()} loss", loc="left", fontweight="bold", fontsize=11)
    axes.set_xlabel("optimiser step" + (", smoothed" if kind == "training" else ""))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
    _grid(axes, "y")
    return svg(figure, f"{kind.capitalize()} loss of each run by optimiser step")


@matplotlib.rc_context(STYLE)
def parallel_coordinates(comparison: Comparison) -> Markup | None:
    """Draw a line for each run through the differing parameters to the ranking's headline (best on top)."""
    scores = ranking_values(comparison)
    shown = [run for run, value in enumerate(scores) if value is not None]
    keys = varied(comparison)
    if comparison.judged_by is None or not keys or len(shown) < 2:
        return None
    labels = short(keys)
    figure = Figure(figsize=(max(4.6, 1.9 * (len(keys) + 1)), 3.1), layout="constrained")
    axes = figure.subplots()
    places = [_places([comparison.differing[key][run] for run in shown]) for key in keys]
    places.append(_places([scores[run] for run in shown], flipped=True, form="{:.3f}"))
    for at, (_, ticks) in enumerate(places):
        axes.plot([at, at], [0, 1], color=LINE, linewidth=1.2, zorder=1)
        for height, text in ticks:
            side = {"ha": "left", "xytext": (8, 0)} if at == len(keys) else {"ha": "right", "xytext": (-8, 0)}
            look = {"va": "center", "fontsize": 8.5, "color": SOFT, "zorder": 4, "bbox": _PAPER, **side}
            axes.annotate(text, (at, height), textcoords="offset points", **look)
    for place, run in reversed(list(enumerate(shown))):
        heights = [column[place] for column, _ in places]
        look: dict[str, Any] = {"color": color(run), "linestyle": dash(run), "linewidth": _width(comparison, run)}
        axes.plot(
            range(len(places)), heights, marker="o", markersize=4.5, gid=f"run-{run}-parallel", zorder=2.5, **look
        )
    axes.set_xticks(range(len(places)), [*labels, comparison.judged_by.label], fontsize=9.5)
    for text, last in zip(axes.get_xticklabels(), [*[False] * len(keys), True], strict=True):
        text.set(color=INK, fontweight="bold" if last else "normal")
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    axes.set_xlim(-0.55, len(keys) + 0.45)
    bare(axes, keep="")
    return svg(figure, f"Parallel coordinates of {', '.join(labels)} against {comparison.judged_by.label}")


@matplotlib.rc_context(STYLE)
def scatters(comparison: Comparison) -> list[Markup]:
    """Draw the ranking's headline against each differing parameter, a small chart for each."""
    scores = ranking_values(comparison)
    if comparison.judged_by is None or sum(value is not None for value in scores) < 2:
        return []
    keys = varied(comparison)
    labels = enumerate(zip(keys, short(keys), strict=True))
    return [_scatter(comparison, key, label, scores, place) for place, (key, label) in labels]


def _scatter(comparison: Comparison, key: str, label: str, scores: Sequence[float | None], place: int) -> Markup:
    assert comparison.judged_by is not None
    figure = Figure(figsize=(3.1, 2.3), layout="constrained")
    axes = figure.subplots()
    values = comparison.differing[key]
    judged = {run: value for run, value in enumerate(scores) if value is not None}
    numbers = {run: value for run in judged if (value := number(values[run])) is not None}
    if len(numbers) == len(judged):
        across = numbers
        known = sorted(set(numbers.values()))
        if _is_wide(known):
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(LogLocator(numticks=6))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        if len(known) <= TICKS:
            axes.set_xticks(known)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    else:
        texts = list(dict.fromkeys(_text(values[run]) for run in judged))
        across = {run: float(texts.index(_text(values[run]))) for run in judged}
        axes.set_xticks(range(len(texts)), texts)
        axes.set_xlim(-0.5, len(texts) - 0.5)
    for run in reversed(judged):
        is_champion = comparison.runs[run].is_champion
        look: dict[str, Any] = {"marker": "*" if is_champion else "o", "markersize": 13 if is_champion else 7}
        axes.plot(across[run], judged[run], color=color(run), linestyle="", gid=f"run-{run}-scatter-{place}", **look)
    axes.set_title(label, loc="left", fontweight="bold", fontsize=10.5)
    axes.set_ylabel(comparison.judged_by.label, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.margins(0.12)
    _grid(axes, "both")
    return svg(figure, f"{comparison.judged_by.label} against {key}")


def ranking_values(comparison: Comparison) -> list[float | None]:
    """Return each run's value of the ranking's headline."""
    return [None if comparison.judged_by is None else comparison.judged_by.of(run) for run in comparison.runs]


def varied(comparison: Comparison) -> list[str]:
    """Return the differing parameters that can affect the result; each gets an axis."""
    return [key for key in comparison.differing if not key.startswith(("tracking.", "project.name", "gate."))][:AXES]


def _places(values: Sequence[Any], flipped: bool = False, form: str | None = None) -> tuple[list[float], list[Any]]:
    """Return heights from 0 to 1, and (height, text) of an axis's ticks; flipped: low values on top."""
    numbers = [number(value) for value in values]
    known = [value for value in numbers if value is not None]
    if len(known) < len(values):
        texts = list(dict.fromkeys(map(_text, values)))
        spread = [0.5] if len(texts) == 1 else [place / (len(texts) - 1) for place in range(len(texts))]
        return [spread[texts.index(_text(value))] for value in values], list(zip(spread, texts, strict=True))
    scale = math.log if _is_wide(known) else float
    low, high = scale(min(known)), scale(max(known))

    def height(value: float) -> float:
        share = 0.5 if high == low else (scale(value) - low) / (high - low)
        return 1 - share if flipped else share

    distinct = sorted(set(known))
    ticks = distinct if len(distinct) <= TICKS else [distinct[0], distinct[len(distinct) // 2], distinct[-1]]
    if form is not None:  # a headline's axis has ticks at its ends only, because its values lie anywhere
        ticks = [distinct[0], distinct[-1]]
    return [height(value) for value in known], [(height(tick), (form or "{:.4g}").format(tick)) for tick in ticks]


def _is_wide(values: Sequence[float]) -> bool:
    """Return True if a logarithmic scale shows the values better."""
    return min(values) > 0 and max(values) / min(values) >= 4


def short(keys: Sequence[str]) -> list[str]:
    """Return labels for dotted keys: the last part if it is unique, else the whole key, at most 28 characters."""
    last = [key.rpartition(".")[2] for key in keys]
    return [_drawn(part if last.count(part) == 1 else key, 28) for key, part in zip(keys, last, strict=True)]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)
    return _drawn(text, 16)


def _drawn(text: str, longest: int) -> str:
    """Cut text to `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _width(comparison: Comparison, run: int) -> float:
    return 2.8 if comparison.runs[run].is_champion else 1.6


def _grid(axes: Axes, axis: Any) -> None:
    axes.grid(axis=axis, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    bare(axes, keep="bottom")
