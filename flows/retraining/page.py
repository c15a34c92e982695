"""The page of all retrainings: one HTML file with their data, candidates and verdicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from flows.charts.curves import ADAPTER, BASE, INK, LINE, SOFT, STYLE, VALIDATION, svg
from flows.params import Params
from flows.paths import Paths
from flows.retraining.history import Entry, entries
from flows.review.page import environment
from peftcore.files import write_atomically

SHOWN = 60
"""Newest retrainings on the page; the history has all."""


def write_history_page(params: Params, paths: Paths) -> Path:
    """Write `paths.retraining_page` from the history, atomically; returns its path."""
    shown = entries(paths)[-SHOWN:]
    tried = [entry for entry in shown if entry.metrics is not None]
    content = {
        "name": params.project.name,
        "stage": params.gate.stage,
        "serving": next((entry for entry in reversed(shown) if entry.outcome == "promoted"), None),
        "entries": shown[::-1],
        "losses": losses_chart(tried) if tried else None,
        "drift": drift_chart(tried) if any(_drift_losses(entry) for entry in tried) else None,
        "total": sum,
    }
    write_atomically(paths.retraining_page, environment().get_template("retraining.html").render(content))
    return paths.retraining_page


@matplotlib.rc_context(STYLE)
def losses_chart(tried: Sequence[Entry]) -> Markup:
    """Return a chart of the candidates' test losses beside those of the base; refused candidates are hollow."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()
    places = range(1, len(tried) + 1)
    losses, bases = ([_loss(entry, side) for entry in tried] for side in ("adapter", "base"))
    axes.plot(places, losses, color=ADAPTER, linewidth=1, alpha=0.4)
    axes.plot(places, bases, color=BASE, linewidth=1.5, linestyle=(0, (4, 3)), label="base")
    for promoted, face, edge, label in ((True, ADAPTER, ADAPTER, "promoted"), (False, "white", VALIDATION, "refused")):
        points = [
            (x, y) for x, y, e in zip(places, losses, tried, strict=True) if (e.outcome == "promoted") is promoted
        ]
        if points:
            axes.scatter(
                *zip(*points, strict=True), s=90, facecolor=face, edgecolor=edge, linewidth=2, zorder=3, label=label
            )
    for x, y in zip(places, losses, strict=True):
        axes.annotate(f"{y:.3f}", (x, y), (0, 11), textcoords="offset points", ha="center", fontsize=9)
    axes.set_ylabel("test loss, nats")
    low, high = min([*losses, *bases]), max([*losses, *bases])
    axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.3 * (high - low or 1))
    axes.legend(frameon=False, loc="upper right", ncols=3)
    _plain(axes, tried)
    return svg(figure, "Test loss of each retraining's candidate beside its base")


@matplotlib.rc_context(STYLE)
def drift_chart(tried: Sequence[Entry]) -> Markup:
    """Return a chart of the champion's loss on new rows, beside its loss on its own test rows."""
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(tried, start=1):
        losses, drift = _drift_losses(entry), entry.drift or {}
        for number, (name, loss, error) in enumerate(losses):
            x = place + (number - (len(losses) - 1) / 2) * 0.6 / max(1, len(losses))
            color = VALIDATION if name in drift.get("suspicious", {}) else ADAPTER
            axes.errorbar(x, loss, 2 * error, fmt="o", color=color, ecolor=color, capsize=3, markersize=6)
            label = Path(name).stem if len(name) < 24 else f"{Path(name).stem[:20]}…"
            axes.annotate(label, (x, loss), (7, -3), textcoords="offset points", fontsize=9, color=INK)
        if losses:
            axes.hlines(drift["champion_loss"], place - 0.4, place + 0.4, color=SOFT, linewidth=1.5)
    axes.set_ylabel("champion's loss, nats")
    axes.margins(y=0.15)
    _plain(axes, tried)
    return svg(figure, "The champion's loss on new rows; the line is its loss on its own test rows")


def _plain(axes: Any, tried: Sequence[Entry]) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0.4, len(tried) + 0.9)
    axes.set_xticks(range(1, len(tried) + 1), [entry.version or "" for entry in tried])
    axes.tick_params(left=False)


def _loss(entry: Entry, side: str) -> float:
    return float((entry.metrics or {})[side]["loss"])


def _drift_losses(entry: Entry) -> list[tuple[str, float, float]]:
    """Return (file, the champion's loss, standard error) of each new file."""
    files = (entry.drift or {}).get("files", {})
    return [(name, file["loss"], file["loss_error"]) for name, file in files.items() if "loss" in file]
