"""Limits of the gate that the figures of a version support: for the first version, which has no champion to beat.

A preset cannot know how much a task can be learned, so its limits are low. One rule gives a limit that fits the task: a
later version has to show half of the gain over the base that this version has certainly shown.

limit   half of the lower confidence bound of the gain over the base (paired bootstrap over the test rows); for a limit
        on a figure itself, the base's figure plus that half

A limit is proposed only if it is stricter than the present one.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from ruamel.yaml import YAML

from flows.errors import StageError
from flows.gate.bootstrap import paired_bootstrap
from flows.gate.promote import Promotion
from flows.gate.rows import row_values, row_weights
from flows.gate.sequence import percent
from flows.params import Params, load_params
from flows.params.gate import Direction
from flows.paths import Paths
from peftcore.files import write_atomically

if TYPE_CHECKING:
    import pyarrow

LIMITS: Sequence[tuple[str, str, Direction, bool]] = (
    ("min_loss_gain", "loss", "lower", True),
    ("min_rouge_l_gain", "rouge_l", "higher", True),
    ("min_eos_rate", "ended", "higher", False),
    ("min_accuracy", "accuracy", "higher", False),
)
"""(key of `gate`, figure of the test rows, its better direction, whether the key limits the gain over the base)."""


@dataclass(frozen=True)
class Proposal:
    """A limit that the figures support."""

    key: str
    """Key in the section `gate`."""
    limit: float
    present: float | None
    """The present limit; None for no limit."""
    reason: str
    """The figures behind the limit, in words."""

    def as_dict(self) -> dict[str, Any]:
        """Return the proposal as values that JSON can hold."""
        return asdict(self)


def first_limits(params: Params, paths: Paths, promotion: Promotion | None) -> list[Proposal]:
    """Return `propose` if the promotion's version had no champion to beat and was accepted; none otherwise."""
    if promotion is None or promotion.report is None or promotion.report.champion or not promotion.accepted:
        return []
    return propose(params, paths)


def propose(params: Params, paths: Paths) -> list[Proposal]:
    """Return stricter limits that follow from the evaluation of the last run; none if no gain is certain.

    Args:
        params: The parameters, with the present limits.
        paths: The project's files.

    Raises:
        StageError: There is no evaluation yet.
    """
    from pyarrow import parquet

    if not paths.evaluation_rows.exists():
        raise StageError(f"there is no {paths.evaluation_rows}; run `peftcore run`, which evaluates a version")
    with parquet.ParquetFile(paths.evaluation_rows) as file:  # read_table would import pandas
        table = file.read()
    found = (_proposal(table, params, *limit) for limit in LIMITS)
    return [one for one in found if one is not None]


def _proposal(
    table: "pyarrow.Table", params: Params, key: str, figure: str, better: Direction, is_gain: bool
) -> Proposal | None:
    sides = [row_values(table, figure, side) for side in ("base", "adapter")]
    if sides[0] is None or sides[1] is None:
        return None
    rows = [row for row in zip(row_weights(table, figure), *sides, strict=True) if None not in row and row[0] > 0]
    if not rows:
        return None
    weights, base, adapter = numpy.array(rows, dtype=numpy.float64).T
    sign, rule = 1.0 if better == "lower" else -1.0, params.gate.champion
    mean, upper = paired_bootstrap(
        weights, sign * adapter, sign * base, rule.confidence, rule.resamples, params.project.seed
    )
    start = 0.0 if is_gain else float(numpy.average(base, weights=weights))
    present = getattr(params.gate, key)
    if not upper < 0 or not _is_stricter(limit := _rounded_down(start - upper / 2), present):
        return None
    reason = f"gain {-mean:.3f} over the base on {len(rows)} rows, {percent(rule.confidence)} lower bound {-upper:.3f}"
    return Proposal(
        key, limit, present, f"{reason}; half of it" + ("" if is_gain else f" above the base's {start:.3f}")
    )


def _is_stricter(limit: float, present: float | None) -> bool:
    return present is None or limit > present


def _rounded_down(value: float) -> float:
    """Return a positive value with two significant digits."""
    digits = 1 - math.floor(math.log10(value))
    return round(math.floor(value * 10**digits) / 10**digits, digits)


def as_yaml(proposals: Sequence[Proposal]) -> str:
    """Return the proposals as lines of params.yaml, with the reasons as comments."""
    keys = [f"  {one.key}: {one.limit:g}" for one in proposals]
    width = max(map(len, keys))
    now = ["no limit" if one.present is None else f"{one.present:g}" for one in proposals]
    lines = [f"{key:<{width}}  # now {old}; {one.reason}" for key, old, one in zip(keys, now, proposals, strict=True)]
    return "\n".join(["gate:", *lines])


def write_limits(file: Path, proposals: Sequence[Proposal]) -> None:
    """Write the limits into a params.yaml, whose comments and other values stay.

    Raises:
        ParamsError: The file cannot be used; nothing is written.
    """
    load_params(file)
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    values = yaml.load(file.read_text(encoding="utf-8"))
    section = values.setdefault("gate", {})
    for one in proposals:
        section[one.key] = one.limit
    stream = StringIO()
    yaml.dump(values, stream)
    write_atomically(file, stream.getvalue())
