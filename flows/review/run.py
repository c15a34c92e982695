"""A run as the comparison sees it, wherever it was found: in a W&B folder, at a W&B server, in the registry.

Names are those of this pipeline: figures as in metrics.json with dots (`adapter.loss`), series as in the training log
(`loss`, `validation_loss`), configuration as in params.yaml with dots (`train.learning_rate`).
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
    """One run; what its source does not tell is empty.

    where: the folder, server path, tag or commit that it was read from.
    state: finished, failed, unfinished or registered.
    config, summary: flat. history: {series: (optimiser step, value)}, steps rising.
    samples: prompt, reference, base, adapter of each. warnings: what could not be read.
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
        """As JSON takes it: without history and samples; a number that is not finite is null."""
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
    """{"a": {"b": 1}} as {"a.b": 1}; an empty mapping is a value."""
    return dict(_leaves(tree, prefix))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def number(value: Any) -> float | None:
    """A finite number, or None; a truth value is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def series(rows: Iterable[Mapping[str, Any]], step: str) -> dict[str, list[Point]]:
    """{column: its points}, from rows with a column `step`; what is no finite number is left out."""
    columns: dict[str, dict[int, float]] = {}
    for row in rows:
        at = number(row.get(step))
        for name, value in row.items():
            known = None if name.startswith("_") or name == step else number(value)
            if at is not None and known is not None:
                columns.setdefault(name, {})[int(at)] = known
    return {name: sorted(points.items()) for name, points in columns.items()}


def joined(runs: Iterable[Run]) -> list[Run]:
    """The runs, those that only evaluate another of them folded into that one; an orphan stays on its own."""
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
