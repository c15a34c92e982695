"""A run of a comparison, from a W&B folder, a W&B server or the registry.

Names are those of this pipeline: figures as dotted keys of metrics.json (`adapter.loss`), series as in the training log
(`loss`, `validation_loss`), configuration as dotted keys of params.yaml (`train.learning_rate`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from flows.runtime.tracking import EVALUATES

Point = tuple[int, float]
Sample = Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One run. Fields that the source lacks are empty.

    Attributes:
        where: the folder, server path, tag or commit of the run.
        state: finished, failed, unfinished or registered.
        config: {dotted key: value} of the configuration.
        summary: {dotted key: value} of the figures.
        history: {series: [(optimiser step, value)]}, in the order of the steps.
        samples: prompt, reference, base's and adapter's answer of each sample.
        warnings: problems while reading the run.
    """

    id: str
    name: str
    where: str
    started: datetime | None = None
    state: str = "finished"
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, list[Point]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    version: str | None = None
    is_champion: bool = False
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the run as values for JSON, without history and samples; a number that is not finite becomes null."""
        return {
            "id": self.id,
            "name": self.name,
            "where": self.where,
            "started": None if self.started is None else self.started.isoformat(timespec="seconds"),
            "state": self.state,
            "version": self.version,
            "champion": self.is_champion,
            "config": {key: _finite(value) for key, value in self.config.items()},
            "summary": {key: _finite(value) for key, value in self.summary.items()},
            "steps": max((points[-1][0] for points in self.history.values() if points), default=None),
            "samples": len(self.samples),
            "warnings": list(self.warnings),
        }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree: {"a": {"b": 1}} becomes {"a.b": 1}. An empty mapping is a value."""
    return dict(_leaves(tree, prefix))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def number(value: Any) -> float | None:
    """Return a finite number as float; None for any other value, booleans included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def series(rows: Iterable[Mapping[str, Any]], step: str) -> dict[str, list[Point]]:
    """Return {column: its points} of rows with a column `step`. Values that are not finite numbers are left out."""
    columns: dict[str, dict[int, float]] = {}
    for row in rows:
        at = number(row.get(step))
        for name, value in row.items():
            point = None if name.startswith("_") or name == step else number(value)
            if at is not None and point is not None:
                columns.setdefault(name, {})[int(at)] = point
    return {name: sorted(points.items()) for name, points in columns.items()}


def joined(runs: Iterable[Run]) -> list[Run]:
    """Merge runs that only evaluate another run into that run; without the other run they stay separate."""
    every = list(runs)
    evaluations: dict[str, list[Run]] = {}
    for run in every:
        evaluations.setdefault(str(run.config.get(EVALUATES)), []).append(run)
    ids = {run.id for run in every}
    alone = [run for run in every if run.config.get(EVALUATES) not in ids - {run.id}]
    return [_folded(run, evaluations.get(run.id, [])) for run in alone]


def _folded(run: Run, evaluations: Iterable[Run]) -> Run:
    for other in evaluations:
        run = replace(
            run,
            summary={**run.summary, **other.summary},
            samples=other.samples or run.samples,
            version=other.version or run.version,
            warnings=run.warnings + other.warnings,
        )
    return run


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
