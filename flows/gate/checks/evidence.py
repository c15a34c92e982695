"""The figures that a version is judged by: they are those that were registered, and they follow from its rows.

The files of an evaluation lie beside the adapter and could be edited, or belong to a later evaluation of it. Figures
that no row tells (perplexity, macro-F1, tokens per second, latency) are bound by the files' SHA-256 alone.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy

from flows.gate.candidate import Candidate, Outcome
from peftcore.files import sha256

if TYPE_CHECKING:
    import pyarrow

SIDES = ("base", "adapter")
TOLERANCE = 1e-6
"""Relative, of a mean that is taken in another order."""
MEANS = {"rouge_l": "{side}_rouge_l", "ended": "{side}_ended"}
"""{figure: the column of which it is the mean, over the rows that have a value}"""


def evidence(candidate: Candidate) -> Outcome:
    """Compare the evaluation's and the merge's files with the record, and their figures with the rows."""
    if wrong := [*_other_files(candidate), *_other_figures(candidate.record, candidate)]:
        return False, f"{wrong[0]}{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}"
    if wrong := list(_unfounded(candidate)):
        return False, (
            f"metrics.json says {wrong[0]}{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}; run "
            "`peftcore stage evaluate --force` and then `peftcore run`, which registers what was really measured"
        )
    return True, f"{len(candidate.evidence)} files have their registered SHA-256, and the figures follow from the rows"


def _other_files(candidate: Candidate) -> Iterator[str]:
    for path, digest in candidate.evidence.items():
        if digest is None:
            yield f"{candidate.version} was registered without the SHA-256 of {path.name}; register it again"
        elif not path.is_file() or sha256(path) != digest:
            yield (
                f"{path.name} is not what was registered as {candidate.version}: it was edited, or the adapter was "
                "evaluated again; `peftcore run` registers a new evaluation as a version of its own"
            )


def _other_figures(record: Mapping[str, Any], candidate: Candidate) -> Iterator[str]:
    """Where the lineage record, which the next candidate is compared with, tells something else than the files."""
    told = {
        **{name: (record.get(name), candidate.metrics.get(name)) for name in ("evaluation_set", "base_model")},
        **{part: (record.get("metrics", {}).get(part), candidate.metrics[part]) for part in (*SIDES, "gain")},
        "merge": (
            record.get("metrics", {}).get("merge"),
            {name: candidate.merge[name] for name in ("kl", "top1_agreement")},
        ),
    }
    for name, (registered, measured) in told.items():
        if not _same(registered, measured):
            yield (
                f"the record of {candidate.version} says {name} {registered}, and its files {measured}; register it "
                "again with `peftcore run`"
            )


def _unfounded(candidate: Candidate) -> Iterator[str]:
    """Figures of metrics.json that are not what the rows come to."""
    metrics, rows = candidate.metrics, candidate.rows
    yield from _differing("rows", metrics.get("rows"), rows.num_rows)
    for side in SIDES:
        yield from _differing(f"{side}.loss", metrics[side]["loss"], _loss(rows, side))
        for figure, column in MEANS.items():
            yield from _differing(f"{side}.{figure}", metrics[side].get(figure), _mean(rows, column.format(side=side)))
        yield from _differing(f"{side}.accuracy", metrics[side].get("accuracy"), _accuracy(rows, side))
    base, adapter = metrics["base"], metrics["adapter"]
    for figure, gain in metrics["gain"].items():
        sign = -1 if figure == "loss" else 1
        if base.get(figure) is not None and adapter.get(figure) is not None:
            yield from _differing(f"gain.{figure}", gain, sign * (adapter[figure] - base[figure]))
    yield from _unfounded_slices(metrics.get("slices") or {}, rows)
    if (control := metrics.get("control")) and (table := candidate.control) is not None:
        yield from _differing("control.rows", control["rows"], table.num_rows)
        for side in SIDES:
            yield from _differing(f"control.{side}_loss", control.get(f"{side}_loss"), _loss(table, side))


def _unfounded_slices(told: Mapping[str, Any], rows: "pyarrow.Table") -> Iterator[str]:
    if not told:
        return
    names = numpy.array(rows.column("slice").to_pylist() if "slice" in rows.column_names else [""] * rows.num_rows)
    if set(told) != set(names.tolist()):
        yield f"slices {', '.join(sorted(told))}, and the rows have {', '.join(sorted(set(names.tolist())))}"
        return
    for name, figures in told.items():
        part = rows.take(numpy.flatnonzero(names == name))
        yield from _differing(f"slices.{name}.rows", figures["rows"], part.num_rows)
        for side in SIDES:
            yield from _differing(f"slices.{name}.{side}_loss", figures[f"{side}_loss"], _loss(part, side))


def _differing(name: str, told: Any, found: float | None) -> Iterator[str]:
    """told: None where the evaluation has no such figure; found: None where the rows have no column for it."""
    if told is None:
        return
    if found is None:
        yield f"{name} {told:g}, for which rows.parquet has no column"
    elif not _same(told, found):
        yield f"{name} {told:g}, and its rows come to {found:g}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-9) or (one != one and other != other)
    return one == other


def _loss(rows: "pyarrow.Table", side: str) -> float | None:
    """The weighted mean of the rows' losses; not a number where they weigh nothing."""
    column = f"{side}_loss"
    if column not in rows.column_names:
        return None
    weight = "weight" if "weight" in rows.column_names else "tokens"
    weights, losses = (rows.column(name).to_numpy().astype(float) for name in (weight, column))
    return float(numpy.average(losses, weights=weights)) if weights.sum() else math.nan


def _mean(rows: "pyarrow.Table", column: str) -> float | None:
    if column not in rows.column_names:
        return None
    values = [float(value) for value in rows.column(column).to_pylist() if value is not None]
    return sum(values) / len(values) if values else None


def _accuracy(rows: "pyarrow.Table", side: str) -> float | None:
    """The share of pairs whose chosen answer is preferred, or of texts whose class is predicted."""
    if f"{side}_margin" in rows.column_names:
        right = [margin > 0 for margin in rows.column(f"{side}_margin").to_pylist()]
    elif f"{side}_prediction" in rows.column_names:
        pairs = zip(*(rows.column(name).to_pylist() for name in ("label", f"{side}_prediction")), strict=True)
        right = [label == prediction for label, prediction in pairs]
    else:
        return None
    return sum(right) / len(right)
