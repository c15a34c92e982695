"""Check of the evidence: the evaluation's files are the registered ones, and their figures follow from their rows.

The files of an evaluation lie beside the adapter. They could have been edited, or belong to a later evaluation.
Figures that do not follow from rows (perplexity, macro-F1, tokens per second, latency) are protected by the files'
SHA-256 alone.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy

from flows.gate.candidate import Candidate, CheckResult
from flows.gate.rows import mean_value
from flows.registry.lineage import MERGE
from flows.verdicts import IDENTITY, suite_figures
from peftcore.files import sha256

if TYPE_CHECKING:
    import pyarrow

BASE_AND_ROWS = ("evaluation_set", "base_model", "calibrated_base")
"""Identities in the evaluation's metrics and in the record; neither has a calibrated base without calibration."""
SIDES = ("base", "adapter")
TOLERANCE = 1e-6
"""Relative tolerance of a mean that is summed in another order."""
MEANS = ("rouge_l", "ended", "accuracy", "divergence", "entity_f1")
"""Figures that are means over the rows that have a value, besides those of the scorers."""


def evidence(candidate: Candidate) -> CheckResult:
    """Compare the evaluation's and the merge's files with the record, and their figures with the rows."""
    if wrong := [*_other_files(candidate), *_other_figures(candidate.record, candidate)]:
        return False, f"{wrong[0]}{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}"
    if wrong := list(_figures_without_rows(candidate)):
        return False, (
            f"metrics.json says {wrong[0]}{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}; run "
            "`peftcore stage evaluate --force` and then `peftcore run`, which registers a new evaluation"
        )
    return True, f"{len(candidate.evidence)} files have their registered SHA-256, and the figures follow from the rows"


def _other_files(candidate: Candidate) -> Iterator[str]:
    for path, digest in candidate.evidence.items():
        if digest is None:
            yield f"{candidate.version} was registered without the SHA-256 of {path.name}; register it again"
        elif not path.is_file() or sha256(path) != digest:
            yield (
                f"{path.name} differs from the registered file of {candidate.version}: it was edited, or the adapter "
                "was evaluated again; `peftcore run` registers a new evaluation as a new version"
            )


def _other_figures(record: Mapping[str, Any], candidate: Candidate) -> Iterator[str]:
    """Yield figures that differ between the files and the record, which the next candidate is compared with."""
    pairs = {
        **{name: (record.get(name), candidate.metrics.get(name)) for name in BASE_AND_ROWS},
        **{part: (record.get("metrics", {}).get(part), candidate.metrics[part]) for part in (*SIDES, "gain")},
        "suites": (record.get("metrics", {}).get("suites"), candidate.metrics.get("suites")),
        "calibration": (record.get("metrics", {}).get("calibration"), candidate.metrics.get("calibration")),
        "benchmarks": (record.get("metrics", {}).get("benchmarks"), candidate.metrics.get("benchmarks")),
        "scorers": (record.get("metrics", {}).get("scorers"), candidate.metrics.get("scorers")),
        "merge": (
            record.get("metrics", {}).get("merge"),
            {name: candidate.merge[name] for name in MERGE if name in candidate.merge},
        ),
    }
    for name, (registered, measured) in pairs.items():
        if not _same(registered, measured):
            yield (
                f"the record of {candidate.version} says {name} {registered}, and its files {measured}; register it "
                "again with `peftcore run`"
            )


def _figures_without_rows(candidate: Candidate) -> Iterator[str]:
    """Yield the figures of metrics.json that do not follow from the rows."""
    metrics, rows = candidate.metrics, candidate.rows
    yield from _differing("rows", metrics.get("rows"), rows.num_rows)
    for side in SIDES:
        yield from _differing(f"{side}.loss", metrics[side]["loss"], _loss(rows, side))
        for figure in (*MEANS, *(metrics.get("scorers") or ())):
            yield from _differing(f"{side}.{figure}", metrics[side].get(figure), mean_value(rows, figure, side))
    base, adapter = metrics["base"], metrics["adapter"]
    for figure, gain in metrics["gain"].items():
        sign = -1 if figure == "loss" else 1
        if base.get(figure) is not None and adapter.get(figure) is not None:
            yield from _differing(f"gain.{figure}", gain, sign * (adapter[figure] - base[figure]))
    yield from _suites_without_answers(metrics.get("suites") or {}, candidate.suites)
    yield from _slices_without_rows(metrics.get("slices") or {}, rows, tuple(metrics.get("scorers") or ()))
    if (control := metrics.get("control")) and (table := candidate.control) is not None:
        yield from _differing("control.rows", control["rows"], table.num_rows)
        for side in SIDES:
            yield from _differing(f"control.{side}_loss", control.get(f"{side}_loss"), _loss(table, side))


def _slices_without_rows(slices: Mapping[str, Any], rows: "pyarrow.Table", scorers: tuple[str, ...]) -> Iterator[str]:
    if not slices:
        return
    names = numpy.array(rows.column("slice").to_pylist() if "slice" in rows.column_names else [""] * rows.num_rows)
    if set(slices) != set(names.tolist()):
        yield f"slices {', '.join(sorted(slices))}, and the rows have {', '.join(sorted(set(names.tolist())))}"
        return
    for name, figures in slices.items():
        part = rows.take(numpy.flatnonzero(names == name))
        yield from _differing(f"slices.{name}.rows", figures["rows"], part.num_rows)
        for side in SIDES:
            yield from _differing(f"slices.{name}.{side}_loss", figures[f"{side}_loss"], _loss(part, side))
            for scorer in scorers:
                figure = f"{side}_{scorer}"
                yield from _differing(f"slices.{name}.{figure}", figures.get(figure), mean_value(part, scorer, side))


def _suites_without_answers(figures: Mapping[str, Any], suites: Mapping[str, Any]) -> Iterator[str]:
    if figures.keys() != suites.keys():
        yield f"suites {', '.join(figures) or 'none'}, and suites.json has {', '.join(suites) or 'none'}"
        return
    for name, result in suites.items():
        expected = suite_figures(result) | {key: result[key] for key in IDENTITY}
        if not _same(figures[name], expected):
            yield f"suites.{name} {figures[name]}, and its answers give {expected}"


def _differing(name: str, figure: Any, from_rows: float | None) -> Iterator[str]:
    """Compare a figure (None: not evaluated) with the value from the rows (None: the rows lack the column)."""
    if figure is None:
        return
    if from_rows is None:
        yield f"{name} {figure:g}, for which rows.parquet has no column"
    elif not _same(figure, from_rows):
        yield f"{name} {figure:g}, and its rows give {from_rows:g}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-9) or (one != one and other != other)
    return one == other


def _loss(rows: "pyarrow.Table", side: str) -> float | None:
    """Return the weighted mean of the rows' losses; NaN if the weights sum to zero."""
    column = f"{side}_loss"
    if column not in rows.column_names:
        return None
    weight = "weight" if "weight" in rows.column_names else "tokens"
    weights, losses = (rows.column(name).to_numpy().astype(float) for name in (weight, column))
    return float(numpy.average(losses, weights=weights)) if weights.sum() else math.nan
