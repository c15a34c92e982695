"""Charts of the review page as SVG for HTML. Text stays text, so it can be searched and read by screen readers."""

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

INK, SOFT, LINE = "#1f2933", "#66727f", "#e3e7eb"
BASE, ADAPTER, VALIDATION = "#a3aeb9", "#0f766e", "#c2571a"
SLICES_SHOWN = 24
MOST_CHARACTERS = 60
"""Longest name of a slice in a chart (characters)."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names come from data and may contain $
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


@matplotlib.rc_context(STYLE)
def headline_bars(base: Mapping[str, Any], adapter: Mapping[str, Any], base_side: str = "base") -> Markup:
    """Draw base against adapter, one small panel per figure, each with its own scale from zero.

    Args:
        base: Figures of the base.
        adapter: Figures of the adapter.
        base_side: Label of the base's figures.
    """
    every = (
        ("loss", "Test loss", "nats, lower is better", "{:.2f}"),
        ("perplexity", "Perplexity", "lower is better", "{:.1f}"),
        ("rouge_l", "ROUGE-L", "0 to 1, higher is better", "{:.3f}"),
        ("ended", "EOS rate", "higher is better", "{:.0%}"),
        ("accuracy", "Accuracy", "higher is better", "{:.1%}"),
        ("macro_f1", "Macro-F1", "0 to 1, higher is better", "{:.3f}"),
        ("entity_f1", "Entity F1", "0 to 1, higher is better", "{:.3f}"),
        ("recall_at_1", "Recall@1", "higher is better", "{:.1%}"),
        ("recall_at_10", "Recall@10", "higher is better", "{:.1%}"),
        ("ndcg_at_10", "nDCG@10", "0 to 1, higher is better", "{:.3f}"),
    )
    panels = [panel for panel in every if panel[0] in base or panel[0] in adapter]
    figure = Figure(figsize=(11, 2.5), layout=ConstrainedLayoutEngine(wspace=0.12))
    (every_axes,) = figure.subplots(1, len(panels), squeeze=False)
    for axes, (key, title, note, form) in zip(every_axes, panels, strict=True):
        heights = [_height(side.get(key)) for side in (base, adapter)]
        labels = [_text(side.get(key), form) for side in (base, adapter)]
        bars = axes.bar([base_side, "adapter"], heights, color=[BASE, ADAPTER], width=0.58)
        axes.bar_label(bars, labels, padding=3, fontweight="bold")
        axes.set_ylim(0, max([*heights, 1e-9]) * 1.22)
        axes.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=20)
        axes.text(0, 1.06, note, transform=axes.transAxes, color=SOFT, fontsize=8.5)
        axes.set_yticks([])
        bare(axes, keep="bottom")
    return svg(figure, f"{base_side.capitalize()} against adapter: " + ", ".join(panel[1] for panel in panels))


@matplotlib.rc_context(STYLE)
def loss_curves(table: Path, best_step: int | None, unit: str) -> Markup:
    """Draw training and validation loss by optimiser step, with the best checkpoint, and the learning rate below.

    Args:
        table: The file of the losses.
        best_step: Step of the best checkpoint.
        unit: Unit of the losses, such as "nats per supervised token".
    """
    train, validation, rate = (_series(table, name) for name in ("train_loss", "validation_loss", "learning_rate"))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    losses.plot(*train, color=ADAPTER, alpha=0.28, linewidth=1)
    losses.plot(train[0], smoothed(train[1]), color=ADAPTER, linewidth=2, label="training (smoothed)")
    losses.plot(*validation, "o-", color=VALIDATION, linewidth=2, markersize=5, label="validation")
    for step, loss in zip(*validation, strict=True):
        if step == best_step:
            losses.axvline(step, color=VALIDATION, linewidth=1, linestyle=(0, (3, 3)))
            where = {"xytext": (-8, 22), "textcoords": "offset points", "ha": "right"}
            losses.annotate(f"best: {loss:.3f} at step {step}", (step, loss), **where, color=VALIDATION, weight="bold")
    losses.set_ylabel(unit)
    losses.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    rates.fill_between(*rate, color=BASE, alpha=0.35, linewidth=0)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("optimiser step")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    rates.margins(x=0.01)
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        bare(axes, keep="bottom")
    return svg(figure, "Training and validation loss by optimiser step")


@matplotlib.rc_context(STYLE)
def reward_curve(records: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Draw the mean reward of generated answers by step with the deviation within a group, and equal groups below.

    Args:
        records: Records of the training log; None is returned if none has a reward.
    """
    rewarded = [record for record in records if record["reward"] is not None]
    if not rewarded:
        return None
    steps, means, deviations, equal = (
        [record[name] for record in rewarded] for name in ("step", "reward", "reward_deviation", "equal_groups")
    )
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    rewards, groups = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    band = [(mean - (spread or 0), mean + (spread or 0)) for mean, spread in zip(means, deviations, strict=True)]
    rewards.fill_between(steps, *zip(*band, strict=True), color=ADAPTER, alpha=0.12, linewidth=0, label="deviation")
    rewards.plot(steps, means, "o-", color=ADAPTER, alpha=0.35, linewidth=1, markersize=3)
    rewards.plot(steps, smoothed(means), color=ADAPTER, linewidth=2, label="mean (smoothed)")
    rewards.set_ylabel("reward")
    rewards.legend(frameon=False, loc="lower right")
    groups.fill_between(steps, [share or 0 for share in equal], color=BASE, alpha=0.35, linewidth=0)
    groups.set_ylabel("equal groups")
    groups.set_ylim(0, 1)
    groups.set_xlabel("optimiser step")
    groups.xaxis.set_major_locator(MaxNLocator(integer=True))
    groups.margins(x=0.01)
    for axes in (rewards, groups):
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        bare(axes, keep="bottom")
    return svg(figure, "Reward of generated answers by optimiser step")


@matplotlib.rc_context(STYLE)
def slice_dumbbells(slices: Mapping[str, Mapping[str, Any]], base_side: str = "base") -> Markup:
    """Draw the test loss of base and adapter for each of the largest slices, joined by a line.

    Args:
        slices: Figures of each slice: `rows`, `base_loss` and `adapter_loss`.
        base_side: Label of the base's figures.
    """
    names = largest(slices)[::-1]
    figure = Figure(figsize=(11, 0.9 + 0.27 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        base, adapter = slices[name]["base_loss"], slices[name]["adapter_loss"]
        axes.plot(
            [base, adapter], [row, row], color=ADAPTER if adapter <= base else VALIDATION, alpha=0.35, linewidth=3
        )
    rows = range(len(names))
    for key, label, color in (("base_loss", base_side, BASE), ("adapter_loss", "adapter", ADAPTER)):
        axes.scatter([slices[name][key] for name in names], rows, color=color, s=44, zorder=3, label=label)
    axes.set_yticks(rows, [f"{_shortened(name)} ({slices[name]['rows']})" for name in names], fontsize=9.5)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel("test loss, nats")
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=2)
    bare(axes, keep="bottom")
    return svg(figure, f"Test loss by slice, {base_side} against adapter")


@matplotlib.rc_context(STYLE)
def reliability(base: Mapping[str, Any], adapter: Mapping[str, Any], base_side: str = "base") -> Markup:
    """Draw accuracy by confidence of base and adapter; perfect calibration is the diagonal.

    Args:
        base: Figures of a calibration: `ece`, and `bins` with `share`, `accuracy` and `confidence`.
        adapter: Those of the adapter.
        base_side: Label of the base's figures.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    lines, shares = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    lines.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (3, 3)))
    for name, side, color, shift in ((base_side, base, BASE, -0.011), ("adapter", adapter, ADAPTER, 0.011)):
        columns = {key: [one[key] for one in side["bins"]] for key in ("confidence", "accuracy", "share")}
        label = f"{name} (ECE {side['ece']:.3f})"
        lines.plot(
            columns["confidence"], columns["accuracy"], "o-", color=color, linewidth=2, markersize=5, label=label
        )
        shares.bar([x + shift for x in columns["confidence"]], columns["share"], width=0.02, color=color)
    lines.set_ylabel("accuracy")
    lines.set_ylim(0, 1)
    lines.legend(frameon=False, loc="upper left")
    shares.set_ylabel("share")
    shares.set_xlabel("confidence (mean probability of the prediction)")
    shares.set_xlim(0, 1)
    for axes in (lines, shares):
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        bare(axes, keep="bottom")
    return svg(figure, f"Accuracy by confidence, {base_side} against adapter")


def largest(slices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the slices with the most rows, at most SLICES_SHOWN; none without a loss."""
    measured = [name for name, figures in slices.items() if figures["base_loss"] is not None]
    return sorted(measured, key=lambda name: (-slices[name]["rows"], name))[:SLICES_SHOWN]


def _series(table: Path, column: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one column, without rows that lack a value."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row[column]]
    return [step for step, _ in rows], [value for _, value in rows]


def smoothed(values: Sequence[float], memory: float = 0.85) -> list[float]:
    """Return the exponential moving average with bias correction."""
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = memory * mean + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        smooth.append(mean / weight)
    return smooth


def _shortened(name: str) -> str:
    """Return a name in one line that leaves room for the chart."""
    line = " ".join(name.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"


def _height(value: float | None) -> float:
    return 0.0 if value is None or not math.isfinite(value) else value


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def bare(axes: Axes, keep: str) -> None:
    """Hide all spines except `keep`, and the tick marks."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == keep)
    axes.tick_params(length=0)


def svg(figure: Figure, label: str) -> Markup:
    """Return a figure as one <svg> element that scales with the page."""
    text = io.StringIO()
    # the label as salt makes the ids of two charts on one page different
    with matplotlib.rc_context({"svg.hashsalt": label}), warnings.catch_warnings():
        # a browser has the glyphs that matplotlib's font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    head, _, body = drawn[drawn.index("<svg") :].partition(">")
    view = head[head.index("viewBox=") :].split('"')[1]
    opening = '<svg viewBox="{}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg" '
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    return Markup(opening + links).format(view, label) + Markup(body)
