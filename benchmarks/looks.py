"""How often a year of weekly candidates ends with a false promotion, with and without control over the sequence.

    python -m benchmarks.looks                 # results/looks.md and looks.json; some minutes
    python -m benchmarks.looks --years 50 --draws 50    # a quick look

A year is 52 candidates, one after another on the same --rows test rows. A row's difference from the champion is
Student's t with 4 degrees of freedom, of deviation --deviation. The gate's own check decides: the paired bootstrap
against the champion, at the level of the candidate's look.

"No gain": no candidate is better than the champion, and the differences of two candidates are independent. That is
close to the worst case of Bonferroni's bound. "Gains": each model has its own deviations from row to row, and the
candidates of weeks 13, 26 and 39 are truly 0.05 nats better than the champion. All others are exactly as good as the
champion. So a later champion was chosen on the same rows. A year ends at its first promotion of a candidate that is no
better. "A few rows much worse" is "no gain" with differences of an exponential distribution less its mean: a candidate
is a little better on most rows and much worse on a few, in a number of test rows that the table names.

The power is the share of candidates with a true gain that are promoted. A candidate whose mean gain is below --skip
times the distance of the normal bound counts as refused without the bootstrap. The table says how many of a sample of
such candidates the bootstrap would have promoted. Intervals are Clopper and Pearson's at 95 %.
"""

import argparse
import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.gate import RESULTS, SHAPES, interval
from benchmarks.machine import machine
from flows.gate.bootstrap import paired_bootstrap
from flows.gate.sequence import Look, at_look, level_of, part_for
from flows.params import Champion, Gate, LookSequence

WEEKS = 52
SEQUENCES = {
    "off": None,
    "even": LookSequence(alpha=0.05, looks=WEEKS),
    "decreasing": LookSequence(alpha=0.05, looks=WEEKS, spending="decreasing"),
}
"""`gate.sequence` of the simulated years; None: each comparison at the confidence of `gate.champion`."""
BETTER = (13, 26, 39)
"""Weeks with a true gain, in years with gains."""
SKEWED_ROWS = (100, 400)
"""Test rows of the years in which a few rows are much worse."""
POWER_WEEKS = (1, 10, 52)
GAINS = (0.03, 0.05, 0.07)
"""True gains in nats per token."""
SAMPLED = 200
"""One of so many skipped candidates is judged by the bootstrap nevertheless."""
Floats = NDArray[numpy.float64]


def main() -> None:
    options = parse()
    measured = measure(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "looks.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (options.folder / "looks.md").write_text(text := table(measured), encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.looks", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--years", type=int, default=500, help="simulated years of 52 weekly candidates")
    parser.add_argument("--draws", type=int, default=60, help="candidates with a true gain, for each gain and week")
    parser.add_argument("--rows", type=int, default=400, help="test rows")
    parser.add_argument("--deviation", type=float, default=0.2, help="of a row's difference, nats per token")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap, at least")
    parser.add_argument("--skip", type=float, default=0.75, help="see above")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the counts for each way of spending."""
    measured: dict[str, Any] = {name: getattr(options, name) for name in ("years", "draws", "rows", "deviation")}
    for name, sequence in SEQUENCES.items():
        judge = Judge(options, sequence)
        years = tqdm(range(options.years), desc=f"{name}: no gain", disable=None)
        counts: dict[str, Any] = {"no_gain": sum(judge.year(number) for number in years)}
        years = tqdm(range(options.years), desc=f"{name}: gains", disable=None)
        counts["gains"] = sum(judge.year_with_gains(number) for number in years)
        counts["skewed"] = {rows: judge.skewed_years(rows) for rows in SKEWED_ROWS}
        counts["power"] = {gain: {week: judge.power(gain, week) for week in POWER_WEEKS} for gain in GAINS}
        levels = {week: 1 - judge.gate(week).champion.confidence for week in POWER_WEEKS}
        measured[name] = counts | {"levels": levels, "sampled": judge.sampled, "missed": judge.missed}
    return measured | {"machine": machine()}


class Judge:
    """The check against the champion at the level of a week's look."""

    def __init__(self, options: argparse.Namespace, sequence: LookSequence | None) -> None:
        self.options, self.sequence = options, sequence
        self.skipped = self.sampled = self.missed = 0
        self._powers: dict[tuple[float, float], int] = {}

    def gate(self, week: int) -> Gate:
        """Return the limits for the candidate of a week (from 1); the first champion has look 1."""
        gate = Gate(champion=Champion(resamples=self.options.resamples))
        if self.sequence is None:
            return gate
        return at_look(gate, Look(week + 1, 1, level_of(self.sequence, week + 1) * part_for(1), 0.0))

    def promotes(self, week: int, weights: Floats, differences: Floats, seed: int) -> bool:
        """Return True if a candidate with these differences from the champion is promoted."""
        rule = self.gate(week).champion
        error = numpy.sqrt(((weights * differences) ** 2).sum()) / weights.sum()
        least = self.options.skip * NormalDist().inv_cdf(rule.confidence) * error
        skip = numpy.average(differences, weights=weights) > -least
        self.skipped += bool(skip)
        if skip and self.skipped % SAMPLED:
            return False
        none = numpy.zeros(len(weights))
        _, upper = paired_bootstrap(weights, differences, none, rule.confidence, rule.resamples, seed)
        passed = upper < rule.max_loss_regression
        self.sampled += bool(skip)
        self.missed += bool(skip and passed)
        return passed

    def year(self, number: int, shape: str = "symmetric", rows: int | None = None) -> bool:
        """Return True if a year without a better candidate has a promotion. shape: a key of `SHAPES`."""
        count = rows or self.options.rows
        generator = numpy.random.default_rng([1, number])
        weights = generator.integers(5, 30, count).astype(float)
        return any(
            self.promotes(week, weights, self.options.deviation * SHAPES[shape](generator, count), 100 * number + week)
            for week in range(1, WEEKS + 1)
        )

    def skewed_years(self, rows: int) -> int:
        """Return how many years have a promotion if each candidate is much worse on a few rows, and no better."""
        years = tqdm(range(self.options.years), desc=f"a few of {rows} rows much worse", disable=None)
        return sum(self.year(number, "a few much worse", rows) for number in years)

    def year_with_gains(self, number: int) -> bool:
        """Return True if a year with better candidates has a promotion of one that is no better than the champion."""
        generator = numpy.random.default_rng([2, number])
        weights = self._weights(generator)
        champion = self._deviations(generator) / 2**0.5
        for week in range(1, WEEKS + 1):
            gain = 0.05 if week in BETTER else 0.0
            candidate = self._deviations(generator) / 2**0.5
            if self.promotes(week, weights, candidate - champion - gain, 100 * number + week):
                if not gain:
                    return True
                champion = candidate
        return False

    def power(self, gain: float, week: int) -> int:
        """Return how many of the draws with a true gain are promoted; the same for weeks of the same level."""
        key = (gain, self.gate(week).champion.confidence)
        if key not in self._powers:
            generator = numpy.random.default_rng([3, round(1e4 * gain)])
            weights = self._weights(generator)
            draws = range(self.options.draws)
            passed = [self.promotes(week, weights, self._deviations(generator) - gain, draw) for draw in draws]
            self._powers[key] = sum(passed)
        return self._powers[key]

    def _weights(self, generator: numpy.random.Generator) -> Floats:
        return generator.integers(5, 30, self.options.rows).astype(float)

    def _deviations(self, generator: numpy.random.Generator) -> Floats:
        return self.options.deviation * SHAPES["symmetric"](generator, self.options.rows)


def table(measured: dict[str, Any]) -> str:
    """Return the figures as Markdown."""

    def told(count: int, of: int) -> str:
        low, high = interval(count, of)
        return f"{count / of:.1%} ({low:.1%} to {high:.1%})"

    years, draws = measured["years"], measured["draws"]
    lines = [
        f"{years:,} simulated years of {WEEKS} weekly candidates; {measured['rows']} test rows, differences of "
        f"{measured['deviation']:g} nats; alpha 0.05, looks {WEEKS}.",
        "",
        f"| at least one false promotion in a year | no gain | gains in weeks {', '.join(map(str, BETTER))} | "
        + " | ".join(f"a few of {rows} rows much worse" for rows in SKEWED_ROWS)
        + " |",
        "|---|" + "---:|" * (2 + len(SKEWED_ROWS)),
    ]
    for name in SEQUENCES:
        counts = (measured[name]["no_gain"], measured[name]["gains"], *measured[name]["skewed"].values())
        lines.append(f"| {name} | {' | '.join(told(count, years) for count in counts)} |")
    lines += ["", f"| promoted of {draws} | true gain | " + " | ".join(f"week {week}" for week in POWER_WEEKS) + " |"]
    lines += ["|---|---:|" + "---:|" * len(POWER_WEEKS)]
    for name in SEQUENCES:
        for gain, weeks in measured[name]["power"].items():
            lines.append(f"| {name} | {float(gain):g} | {' | '.join(told(one, draws) for one in weeks.values())} |")
    lines += ["", "| level | " + " | ".join(f"week {week}" for week in POWER_WEEKS) + " |"]
    lines += ["|---|" + "---:|" * len(POWER_WEEKS)]
    for name in SEQUENCES:
        lines.append(f"| {name} | {' | '.join(f'{level:.2g}' for level in measured[name]['levels'].values())} |")
    sampled, missed = (sum(measured[name][key] for name in SEQUENCES) for key in ("sampled", "missed"))
    lines += [
        "",
        f"Of {sampled} sampled candidates that were refused by their mean alone, the bootstrap promotes {missed}.",
    ]
    return "\n".join([*lines, "", f"{measured['machine']}. `python -m benchmarks.looks`"]) + "\n"


if __name__ == "__main__":
    main()
