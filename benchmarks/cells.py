"""Long benchmarks in cells: each is kept in a file of its own, so that a run which was cut off goes on.

A cell is one arm trained from one seed, or something else that is measured by itself; `name` is any text without "/".
"""

import argparse
import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from tqdm import tqdm

from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 10_000
Cell = dict[str, Any]


def parser_of(benchmark: str, description: str | None, prepared: bool = True) -> argparse.ArgumentParser:
    """With the options that all such benchmarks have; prepared: whether it learns from the pipeline's own rows."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.{benchmark}", description=str(description).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="of each arm, at least 2")
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"), help="model folder")
    if prepared:
        parser.add_argument("--data", type=Path, default=Path("artifacts/data"), help="folder of the prepared splits")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    kept = Path(tempfile.gettempdir()) / f"peftcore-{benchmark}"
    parser.add_argument("--cells", type=Path, default=kept, help="where cells are kept")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", metavar="CELL", help="measure this cell")
    chosen.add_argument("--missing", action="store_true", help="name the cells that are missing; measure nothing")
    chosen.add_argument("--draw", action="store_true", help="table and picture from the cells that are there")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse what cannot be measured."""
    if options.seeds < 2:
        parser.error(f"--seeds: {options.seeds} says nothing of how results scatter; give at least 2")
    if options.only and options.only not in names:
        parser.error(f"--only: there is no cell {options.only!r}; there are {' '.join(names)}")
    splits = [options.data / f"{split}.parquet" for split in ("train", "test")] if "data" in options else []
    for path in (options.base / "config.json", *splits):
        if not path.exists():
            parser.error(f"there is no {path}; run the pipeline's fetch and prepare stages first")


def measure_missing(
    options: argparse.Namespace, names: Sequence[str], settings: Any, measure: Callable[[str], Cell]
) -> bool:
    """Measure the cells that are not there, or what `options` say; whether a report is then due."""
    wanted = [options.only] if options.only else names
    missing = [name for name in wanted if read(options.cells, name, settings) is None]
    if options.missing:
        print("\n".join(missing))
        return False
    bar = tqdm([] if options.draw else missing, unit="cell", disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        write(options.cells, name, settings, measure(name) | {"machine": machine()})
    return not options.only


def there(options: argparse.Namespace, names: Sequence[str], settings: Any) -> dict[str, Cell]:
    """The cells that have been measured."""
    return {name: cell for name in names if (cell := read(options.cells, name, settings)) is not None}


def read(folder: Path, name: str, settings: Any) -> Cell | None:
    """A cell that was measured in this very setting, or None."""
    file = folder / f"{name}.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return kept["cell"] if kept.get("settings") == settings else None


def write(folder: Path, name: str, settings: Any, cell: Cell) -> None:
    """Keep a cell, wholly or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps({"settings": settings, "cell": cell}), encoding="utf-8")
    partial.replace(folder / f"{name}.json")


# -- figures ---------------------------------------------------------------------------------------------------------


def paired(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], weights: Sequence[float]
) -> dict[str, Any]:
    """Mean difference of two arms' losses, with 95 % intervals over seeds (Student's t) and rows (bootstrap).

    ours, theirs: losses of the same held-out rows for the same seeds (seeds, rows); weights: of each row.
    """
    differences = np.subtract(ours, theirs)
    by_seed = np.average(differences, axis=1, weights=weights)
    mean = float(by_seed.mean())
    half = float(student.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / math.sqrt(len(by_seed)))
    shares, by_row = np.array(weights), differences.mean(0)
    drawn = np.random.default_rng(0).integers(len(shares), size=(RESAMPLES, len(shares)))
    means = (by_row * shares)[drawn].sum(1) / shares[drawn].sum(1)
    return {
        "difference": mean,
        "by_seed": by_seed.tolist(),
        "over_seeds": [mean - half, mean + half],
        "over_rows": [float(q) for q in np.quantile(means, [0.025, 0.975])],
    }


def intervals(one: dict[str, Any]) -> list[list[float]]:
    """Both of a comparison's, (low, high) each."""
    return [one["over_seeds"], one["over_rows"]]


def verdict(one: dict[str, Any], margin: float = 0.0) -> str:
    """What both intervals say of a difference in losses; margin: within which two arms count as equal."""
    if all(low > -margin and high < margin for low, high in intervals(one)):
        return "equal within the margin"
    if all(low > 0 for low, _ in intervals(one)):
        return "worse"
    return "better" if all(high < 0 for _, high in intervals(one)) else "not decided"


def comparison_row(first: Sequence[str], one: dict[str, Any], said: str) -> str:
    """A row of a Markdown table: the first columns, seeds, difference, both intervals, verdict."""
    between = [f"{low:+.4f} to {high:+.4f}" for low, high in intervals(one)]
    difference = f"{one['difference']:+.4f}"
    return f"| {' | '.join([*first, str(len(one['by_seed'])), difference, *between, said])} |"


def scatter(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def machines(cells: dict[str, Cell]) -> str:
    """Where the cells were measured; the load was another for each, so it is left out."""
    kinds = {re.sub(r", load [\d.]+", "", cell["machine"]) for cell in cells.values()}
    return "; ".join(sorted(kinds)) or machine()
