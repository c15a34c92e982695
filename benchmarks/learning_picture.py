"""The picture of `benchmarks.learning`: loss by parameters on the left, learning curves by family on the right."""

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#AA3377", "#9A7400", "#333333"]
"""One for each family: Okabe and Ito's hues, the light ones darkened so that text in them can be read."""
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))]
POINTS = [1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.2]
LOSSES = [1, 1.5, 2, 3, 4, 5]
IGNORANCE = math.log(10)
"""Loss of equal chances for ten classes."""
GREY = "#6b6b6b"
LEFT = "A tiny Llama that reads upright handwritten digits has to read transposed ones; the adapter alone trains."
RIGHT = "The same trainings, one thread of a CPU. Coloured: the family; pale: all others, for comparison."
NOTES = (
    "X-LoRA mixes three LoRAs that were trained before; its own parameters are counted. Poly and multitask prompts "
    "learn upright digits too, as the other of two tasks."
)


def draw(measured: dict[str, Any], folder: Path) -> None:
    """Write learning.png."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    rows = measured["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    colours = dict(zip(families, COLOURS, strict=False))
    figure: Any = plt.figure(figsize=(16, 9.2))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.06))
    draw_points(left, rows, colours)
    draw_curves(right, rows, colours, measured["base_loss"])
    figure.text(0.01, 0.012, f"{NOTES}\nMeasured on {measured['machine']}.", color=GREY, fontsize=8)
    save_png(figure, folder / "learning.png")
    plt.close(figure)


def save_png(figure: Any, path: Path) -> None:
    """With a palette of 128 colours, a third of the size."""
    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=110)
    Image.open(whole).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def headline(part: Any, title: str, text: str) -> None:
    part.text(0.02, 0.962, title, fontsize=14, weight="bold")
    part.text(0.02, 0.936, text, fontsize=9.5, color=GREY)


# -- left ------------------------------------------------------------------------------------------------------------


def draw_points(part: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    headline(part, "What each method reaches with how many parameters", LEFT)
    axes = part.subplots()
    part.subplots_adjust(left=0.09, right=0.98, top=0.85, bottom=0.115)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for family, colour in colours.items():
        own = [row for row in rows if row["family"] == family]
        axes.scatter([r["trainable"] for r in own], [r["loss_after"] for r in own], s=42, color=colour, label=family)
    sizes = [row["trainable"] for row in rows]
    axes.set_xlim(min(sizes) / 1.7, max(sizes) * 1.9)
    axes.set_ylim(min(row["loss_after"] for row in rows) * 0.93, IGNORANCE * 1.02)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(POINTS, [f"{loss:g}" for loss in POINTS])
    axes.set_xticks([300, 1000, 3000, 10000], ["300", "1,000", "3,000", "10,000"])
    axes.minorticks_off()
    axes.axhline(IGNORANCE, color=GREY, lw=1, ls=":")
    note = {"textcoords": "offset points", "color": GREY, "fontsize": 8.5, "ha": "right"}
    right_end = (axes.get_xlim()[1], IGNORANCE)
    axes.annotate("equal chances for all ten digits: 2.30", right_end, (-4, -11), **note)
    axes.set_xlabel("trainable parameters (log scale)")
    axes.set_ylabel("loss on held-out transposed digits, nats (log scale; lower is better)")
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0), ncols=3, frameon=False, handletextpad=0.2)
    axes.annotate("better", (0.03, 0.03), (0.085, 0.085), "axes fraction", color=GREY, fontsize=9,
                  arrowprops={"arrowstyle": "->", "color": GREY})  # fmt: skip
    place_labels(axes, rows, colours)


def place_labels(axes: Axes, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Name each point where its name covers least, the crowded points first."""
    figure: Any = axes.figure
    renderer = figure.figure.canvas.get_renderer()
    spots = [tuple(axes.transData.transform((row["trainable"], row["loss_after"]))) for row in rows]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in spots]
    crowd = [sum(math.dist(spot, other) < 90 for other in spots) for spot in spots]
    for number in sorted(range(len(rows)), key=lambda n: -crowd[n]):
        row, (x, y) = rows[number], spots[number]
        text = axes.text(0, 0, row["name"], color=colours[row["family"]], fontsize=9.5, transform=None)
        box = text.get_window_extent(renderer)
        place = min(places(x, y, box.width, box.height), key=partial(cost, spot=(x, y), taken=taken, inside=axes.bbox))
        taken.append(place)
        text.remove()
        near = (min(max(x, place.x0), place.x1), min(max(y, place.y0), place.y1))
        back = axes.transData.inverted()
        if math.dist(near, (x, y)) > 9:
            ends = back.transform([(x, y), near])
            axes.plot(
                ends[:, 0], ends[:, 1], color=colours[row["family"]], lw=0.7, alpha=0.6, scalex=False, scaley=False
            )
        at: Any = back.transform((place.x0, place.y0))
        axes.text(at[0], at[1], row["name"], color=colours[row["family"]], fontsize=9.5, va="bottom")


def places(x: float, y: float, width: float, height: float) -> list[Bbox]:
    """Boxes of this size around a point, near ones first."""
    found = []
    for gap in range(8, 100, 6):
        for angle in range(0, 360, 15):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            middle = x + dx * (gap + width / 2), y + dy * (gap + height / 2)
            found.append(Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height))
    return found


def cost(place: Bbox, spot: tuple[float, float], taken: list[Bbox], inside: Bbox) -> float:
    near = (min(max(spot[0], place.x0), place.x1), min(max(spot[1], place.y0), place.y1))
    covered = sum(overlap(place.padded(2), other) for other in taken)
    outside = place.width * place.height - overlap(place, inside)
    return 20 * covered + 50 * outside + math.dist(near, spot)


def overlap(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else common.width * common.height


# -- right -----------------------------------------------------------------------------------------------------------


def draw_curves(part: Any, rows: list[dict[str, Any]], colours: dict[str, str], base_loss: float) -> None:
    headline(part, "How fast each method learns", RIGHT)
    grid = part.subplots(3, 2, sharex=True, sharey=True, squeeze=False)
    part.subplots_adjust(left=0.065, right=0.81, top=0.89, bottom=0.115, wspace=0.62, hspace=0.22)
    longest = max(row["curve"]["seconds"][-1] for row in rows)
    shortest = min(row["curve"]["seconds"][1] for row in rows)
    losses = [loss for row in rows for loss in row["curve"]["losses"]]
    lowest, highest = 0.93 * min(losses), 1.06 * max(base_loss, *losses)
    for number, (axes, family) in enumerate(zip(grid.flat, colours, strict=False)):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(shortest, longest)
        axes.set_ylim(lowest, highest)
        axes.set_yticks(LOSSES, [f"{loss:g}" for loss in LOSSES])
        axes.minorticks_off()
        axes.grid(color="#e6e6e6", lw=0.7)
        axes.set_axisbelow(True)
        axes.set_title(family, loc="left", color=colours[family], fontsize=10.5, weight="bold", pad=4)
        axes.axhline(base_loss, color=GREY, lw=1, ls=":")
        for row in rows:
            if row["family"] != family:
                axes.plot(row["curve"]["seconds"][1:], row["curve"]["losses"][1:], color="#dddddd", lw=0.7, zorder=1)
        draw_family(axes, [row for row in rows if row["family"] == family], colours[family], longest, lowest)
        if number == 0:
            axes.annotate("base, before training", (longest, base_loss), (-2, -10), textcoords="offset points",
                          color=GREY, fontsize=8, ha="right")  # fmt: skip
        if number % 2 == 0:
            axes.set_ylabel("held-out loss, nats")
        if number >= 4:
            axes.set_xlabel("seconds of training (log scale)")
            axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
            axes.set_xlim(shortest, longest)


def draw_family(axes: Axes, rows: list[dict[str, Any]], colour: str, longest: float, lowest: float) -> None:
    """A family's curves, each named at the right; names are moved apart, and a line leads to each."""
    rows = sorted(rows, key=lambda row: row["loss_after"])
    heights = spread([math.log(row["loss_after"]) for row in rows], 0.135, math.log(lowest))
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        dash = DASHES[number % len(DASHES)]
        seconds, losses = row["curve"]["seconds"], row["curve"]["losses"]
        axes.plot(seconds[1:], losses[1:], color=colour, lw=1.5, ls=dash, zorder=3)
        axes.plot(seconds[-1], losses[-1], "o", color=colour, ms=3.5, zorder=4)
        start, end = longest * 1.12, longest * 1.5
        axes.plot([seconds[-1], start, end], [losses[-1], math.exp(height), math.exp(height)], color=colour, lw=0.5,
                  alpha=0.55, clip_on=False, zorder=2)  # fmt: skip
        axes.plot([start, end], [math.exp(height)] * 2, color=colour, lw=1.5, ls=dash, clip_on=False)
        axes.text(end * 1.1, math.exp(height), row["name"], color=colour, fontsize=9, va="center")


def spread(values: list[float], gap: float, lowest: float) -> list[float]:
    """Ascending values moved apart by at least `gap`, kept about where they were and not under `lowest`."""
    moved: list[float] = []
    for value in values:
        moved.append(value if not moved else max(value, moved[-1] + gap))
    shift = sum(moved) / len(moved) - sum(values) / len(values)
    shift = min(shift, moved[0] - lowest)
    return [value - shift for value in moved]
