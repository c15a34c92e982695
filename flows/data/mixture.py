"""Training rows of several sources in exact proportions (`data.mixture`).

With weights w, source i gives T·wᵢ/Σw rows, rounded by the largest remainder, so that the counts sum to T. No row is
repeated: T is the largest total for which no source needs more rows than it has, and at most `data.train_rows`.
"""

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.data.examples import AnyExample
from flows.data.splits import Row, sample
from flows.errors import DataError
from flows.params import Data
from flows.paths import Split


def mixture_counts(data: Data, available: dict[str, int]) -> dict[str, int]:
    """Return {name of a source: number of its training rows}.

    Args:
        data: The section of params.yaml.
        available: Training rows of each source, duplicates removed.

    Raises:
        DataError: A source has no training rows, or fewer than its `rows`.
    """
    for one in data.mixture:
        have, wanted = available.get(one.name, 0), one.rows or 1
        if have < wanted:
            raise DataError(
                f"data.mixture: {one.name} has {have} training rows, and {wanted} are needed; give it more data, or "
                "fewer rows"
            )
    if data.mixture[0].rows is not None:
        return {one.name: one.rows or 0 for one in data.mixture}
    weights = {one.name: Fraction(str(1.0 if one.weight is None else one.weight)) for one in data.mixture}
    whole = sum(weights.values())
    total = min(int(available[name] * whole / weight) for name, weight in weights.items())
    if data.train_rows is not None:
        total = min(total, data.train_rows)
    exact = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(weights, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    if empty := [name for name, count in counts.items() if count == 0]:
        raise DataError(
            f"data.mixture: of {total} training rows, {', '.join(empty)} gets none; give a larger weight, or more "
            "data.train_rows"
        )
    return counts


def mixed(rows: list[Row], data: Data, seed: int) -> list[Row]:
    """Return the training rows of the mixture, in an order that the seed decides."""
    counts = mixture_counts(data, Counter(row.source for row in rows))
    chosen = [sample([row for row in rows if row.source == name], count, seed) for name, count in counts.items()]
    return sample([row for part in chosen for row in part], None, seed)


def mixture_report(
    data: Data, examples: list[AnyExample], available: list[Row], splits: dict[Split, list[Row]], root: Path
) -> dict[str, Any]:
    """Return {name: source, weight or rows, examples, available training rows, rows of each split, DVC's version}.

    Args:
        data: The section of params.yaml.
        examples: All examples.
        available: Training rows before the mixture.
        splits: Rows of each split.
        root: Folder that a relative path starts from.
    """
    read, left = Counter(one.source for one in examples), Counter(row.source for row in available)
    used = {split: Counter(row.source for row in rows) for split, rows in splits.items()}
    report: dict[str, Any] = {}
    for one in data.mixture:
        part = {"rows": one.rows} if one.rows is not None else {"weight": 1.0 if one.weight is None else one.weight}
        report[one.name] = {"source": one.source} | part | {"examples": read[one.name], "available": left[one.name]}
        report[one.name] |= {split: counts[one.name] for split, counts in used.items()}
        pointer = root / f"{one.source}.dvc"
        if pointer.is_file():
            report[one.name]["dvc"] = _tracked(pointer)
    return report


def _tracked(pointer: Path) -> dict[str, Any]:
    """Return the digest of a file that DVC tracks, and for an import the repository, the revision and the path."""
    content = YAML(typ="safe").load(pointer)
    tracked = {key: value for key, value in content["outs"][0].items() if key == "md5"}
    imported = (content.get("deps") or [{}])[0]
    repository = imported.get("repo") or {}
    names = {"url": repository.get("url"), "rev": repository.get("rev_lock"), "path": imported.get("path")}
    return tracked | {key: value for key, value in names.items() if value is not None}
