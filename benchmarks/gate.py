"""How often the gate is wrong: promotions of a model that is no better, and of one that is, over simulated runs.

    python -m benchmarks.gate                 # results/gate.md, .json and .png; some minutes
    python -m benchmarks.gate --draws 100     # a quick look
    python -m benchmarks.gate --draw          # table and picture from the last figures

A draw is two models measured on the same test rows in --slices slices: the losses of the rows are log-normal, and what
the candidate's differ by is Student's t with 4 degrees of freedom (a few rows change much) of deviation --deviation,
around minus the true gain. The gate's own two checks decide, at the defaults of params.yaml: the paired bootstrap
against the champion, and the slices. "One slice worse" has the gain everywhere but in one slice, which is that much
worse. "No better, by test rows" is the first check alone, in ten times as many draws, for a candidate that is as often
better as worse, and for one that is a little better on most rows and much worse on a few (an exponential less its
mean). Intervals are Clopper and Pearson's at 95 %.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy
import pyarrow
from numpy.typing import NDArray
from scipy.stats import beta
from tqdm import tqdm

from benchmarks.learning_picture import GREY, save_png
from benchmarks.machine import machine
from flows.gate.bootstrap import paired_bootstrap, paired_losses
from flows.gate.slices import slice_differences
from flows.params import Gate

RESULTS = Path(__file__).parent / "results"
GAINS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05)
"""Nats per token."""
FEW = (5, 10, 30, 100, 400)
"""Test rows of a model that is no better."""
Change = Callable[[numpy.random.Generator, int], NDArray[numpy.float64]]
SHAPES: dict[str, Change] = {
    "symmetric": lambda generator, rows: generator.standard_t(4, rows) / 2**0.5,  # t with 4 degrees has a variance of 2
    "a few much worse": lambda generator, rows: generator.exponential(1.0, rows) - 1.0,
}
"""How the losses of two models that are equally good differ from row to row, of deviation 1."""
WORSE = (0.0, 0.2, 0.3, 0.5, 0.8)
"""Nats per token by which one slice is worse, while the rest gains 0.05."""


def main() -> None:
    options = parse()
    if not options.draw:
        measured = measure(options)
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "gate.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    measured = json.loads((options.folder / "gate.json").read_text(encoding="utf-8"))
    (options.folder / "gate.md").write_text(text := table(measured), encoding="utf-8")
    draw(measured, options.folder / "gate.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gate", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--draws", type=int, default=1000, help="simulated pairs of models for each true gain")
    parser.add_argument("--rows", type=int, default=400, help="test rows")
    parser.add_argument("--slices", type=int, default=10, help="of as many rows each")
    parser.add_argument("--deviation", type=float, default=0.2, help="of a row's difference, nats per token")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--draw", action="store_true", help="table and picture from the last figures")
    options = parser.parse_args()
    if options.draws < 10 or options.rows < 2 * options.slices:
        parser.error("--draws: at least 10; --rows: at least two for each slice")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(options, name) for name in ("draws", "rows", "slices", "deviation")}
    found["confidence"] = Gate().champion.confidence
    found["gains"] = {gain: share_of(options, gain, 0.0) for gain in tqdm(GAINS, desc="gains", disable=None)}
    found["worse"] = {worse: share_of(options, 0.05, worse) for worse in tqdm(WORSE, desc="one slice", disable=None)}
    found["few"] = {
        rows: {shape: no_better(options, rows, change) for shape, change in SHAPES.items()}
        for rows in tqdm(FEW, desc="few rows", disable=None)
    }
    return found | {"machine": machine()}


def no_better(options: argparse.Namespace, rows: int, change: Change) -> int:
    """In how many of ten times the draws a model that is no better is judged better, of so many test rows."""
    generator, rule = numpy.random.default_rng(rows), Gate().champion
    found = 0
    for number in range(10 * options.draws):
        weights = generator.integers(5, 30, rows).astype(float)
        differences = options.deviation * change(generator, rows)
        none = numpy.zeros(rows)
        _, upper = paired_bootstrap(weights, differences, none, rule.confidence, options.resamples, number)
        found += upper < rule.max_loss_regression
    return found


def share_of(options: argparse.Namespace, gain: float, worse: float) -> dict[str, Any]:
    """How many draws each check lets through; worse: nats by which the first slice is worse."""
    generator = numpy.random.default_rng([round(1e4 * gain), round(1e4 * worse)])
    gate, better, slices = Gate(), 0, 0
    for number in range(options.draws):
        ours, theirs = tables(generator, options, gain, worse)
        weights, own, other, _ = paired_losses(ours, theirs)
        _, upper = paired_bootstrap(weights, own, other, gate.champion.confidence, options.resamples, number)
        better += upper < gate.champion.max_loss_regression
        slices += not any(
            one.is_worse for one in slice_differences(ours, theirs, gate.slices, options.resamples, number)
        )
    return {"better": better, "slices": slices}


def tables(
    generator: numpy.random.Generator, options: argparse.Namespace, gain: float, worse: float
) -> tuple[pyarrow.Table, pyarrow.Table]:
    """(candidate's rows, champion's rows)"""
    rows = options.rows
    place = numpy.arange(rows) % options.slices
    champion = generator.lognormal(1.0, 0.4, rows)
    change = options.deviation * SHAPES["symmetric"](generator, rows)
    shift = numpy.where((place == 0) & (worse > 0), worse, -gain)
    common = {"id": [f"row{n}" for n in range(rows)], "slice": [f"s{n}" for n in place]}
    tokens = generator.integers(5, 30, rows)
    sides = (champion + change + shift, champion)
    ours, theirs = (pyarrow.table({**common, "tokens": tokens, "adapter_loss": losses}) for losses in sides)
    return ours, theirs


def interval(count: int, draws: int) -> tuple[float, float]:
    """Clopper and Pearson's at 95 %."""
    low = beta.ppf(0.025, count, draws - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, draws - count) if count < draws else 1.0
    return float(low), float(high)


def table(measured: dict[str, Any]) -> str:
    """Markdown: what the checks let through, by what is true."""
    draws = measured["draws"]

    def told(count: int, of: int = draws) -> str:
        low, high = interval(count, of)
        return f"{count / of:.1%} ({low:.1%} to {high:.1%})"

    lines = [
        f"{draws:,} simulated pairs of models a row; {measured['rows']} test rows in {measured['slices']} slices, "
        f"differences of {measured['deviation']:g} nats; confidence {measured['confidence']:g}, no regression allowed.",
        "",
        "| true gain, nats a token | judged better than the champion | no slice judged worse |",
        "|---:|---:|---:|",
    ]
    for gain, one in measured["gains"].items():
        lines.append(f"| {float(gain):g} | {told(one['better'])} | {told(one['slices'])} |")
    lines += ["", "| one slice truly worse, the rest 0.05 better | no slice judged worse |", "|---:|---:|"]
    lines += [f"| {float(worse):g} | {told(one['slices'])} |" for worse, one in measured["worse"].items()]
    lines += ["", f"| no better, by test rows | {' | '.join(SHAPES)} |", "|---:|---:|---:|"]
    for rows, shapes in measured["few"].items():
        lines.append(f"| {rows} | {' | '.join(told(shapes[shape], 10 * draws) for shape in SHAPES)} |")
    return "\n".join([*lines, "", f"{measured['machine']}. `python -m benchmarks.gate`"]) + "\n"


def draw(measured: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure: Any = plt.figure(figsize=(11, 4.2))
    figure.text(
        0.02, 0.93, "How often the gate is wrong, and how often it sees what is there", fontsize=14, weight="bold"
    )
    text = f"{measured['draws']:,} simulated pairs of models; {measured['rows']} test rows; bars: 95 % intervals."
    figure.text(0.02, 0.87, text, color=GREY)
    grid = figure.add_gridspec(1, 2, top=0.76, bottom=0.17, left=0.07, right=0.97, wspace=0.25)
    level = 100 * (1 - measured["confidence"])
    for number, (key, check, refused, title, label) in enumerate(
        (
            ("gains", "better", False, "Judged better than the champion", "true gain, nats a token"),
            ("worse", "slices", True, "Refused for a slice", "one slice truly worse by, nats a token (0.2 is allowed)"),
        )
    ):
        axes = figure.add_subplot(grid[number])
        points = [float(point) for point in measured[key]]
        counts = [measured["draws"] - one[check] if refused else one[check] for one in measured[key].values()]
        shares = [100 * count / measured["draws"] for count in counts]
        bounds = [interval(count, measured["draws"]) for count in counts]
        errors = [[s - 100 * b[0] for s, b in zip(shares, bounds, strict=True)],
                  [100 * b[1] - s for s, b in zip(shares, bounds, strict=True)]]  # fmt: skip
        axes.errorbar(points, shares, errors, color="#0072B2", marker="o", ms=5, capsize=3)
        axes.axhline(level, color=GREY, lw=1, ls=":")
        axes.annotate(f"{level:.0f} %", (points[-1], level), (0, 3), textcoords="offset points", ha="right", color=GREY)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylabel("% of draws")
        axes.set_ylim(-3, 103)
    figure.text(0.02, 0.02, f"Computed on {measured['machine']}.", color=GREY, fontsize=8)
    save_png(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    main()
