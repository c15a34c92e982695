"""Registered versions and DVC experiments as runs of a comparison.

Figures and parameters come from the commit, the training log and the samples from DVC's cache or remote.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.errors import RegistryError, ReviewError
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.registry.reader import Version
from flows.review.run import Point, Run, Sample, flat, series
from flows.runtime.git import Git, GitError
from flows.scaling.experiment import EXPERIMENTS


class Versions:
    """The versions and experiments of one repository."""

    def __init__(self, root: Path, params: Params) -> None:
        """Read the registry of the repository at `root` once."""
        self.paths = Paths(root)
        self.git = Git(root)
        self.registry = registry_of(params, root).snapshot()
        self.stages = self.registry.stages()
        self.champion = self.stages.get(params.gate.stage)

    def version(self, name: str) -> Run:
        """Return a version by its number or by a stage that it holds. Raises RegistryError if there is none."""
        holder = self.stages.get(name)
        if holder is None and not re.fullmatch(r"v[\d.]+", name):
            stages = ", ".join(f"{stage} ({one.version})" for stage, one in self.stages.items()) or "none"
            raise RegistryError(
                f"{name} is no folder, no version, and no stage that a version has; stages: {stages}. "
                "`peftcore registry list` lists the versions, `peftcore promote` gives a stage"
            )
        version = self.registry.version((holder and holder.version) or name)
        record = self.registry.record(version)
        history, samples, warnings = self._from_dvc(version.commit)
        run = Run(
            id=version.number,
            name=version.number,
            where=version.tag,
            started=datetime.fromisoformat(record["created"]),
            state="registered",
            config=flat(record["params"]),
            summary=flat(record["metrics"]),
            history=history,
            samples=samples,
            version=version.number,
            warnings=warnings,
        )
        return self.marked([run])[0]

    def experiments(self, name: str = "") -> list[Run]:
        """Return the DVC experiment with a name, or all experiments. Raises ReviewError if there is none."""
        form = "%(refname)%1f%(objectname)%1f%(committerdate:unix)"
        lines = self.git.run("for-each-ref", f"--format={form}", EXPERIMENTS).splitlines()
        references = [line.split("\x1f") for line in lines]
        names = [ref.rpartition("/")[2] for ref, *_ in references]
        runs = [
            self._experiment(experiment, commit, int(when))
            for experiment, (_, commit, when) in zip(names, references, strict=True)
            if name in ("", experiment)
        ]
        if not runs:
            raise ReviewError(
                f"there is no DVC experiment {name or 'yet'}; there is: {', '.join(names) or 'none'}. "
                "`peftcore trial train.learning_rate=1e-3` makes one, `dvc exp run --queue -S` several"
            )
        return runs

    def marked(self, runs: list[Run]) -> list[Run]:
        """Add the version, found by the id of the W&B run, and the champion's mark to runs."""
        by_id = {}
        for version in self.registry.versions() if any(run.version is None for run in runs) else ():
            by_id[self._wandb_id(version)] = version.number
        known = [replace(run, version=run.version or by_id.get(run.id)) for run in runs]
        champion = None if self.champion is None else self.champion.version
        tag = f"{self.registry.name}@{champion}"
        return [
            replace(run, is_champion=champion is not None and run.version == champion and _tag(run, tag) == tag)
            for run in known
        ]

    def _wandb_id(self, version: Version) -> str | None:
        try:
            return self.registry.record(version).get("wandb_run_id")
        except RegistryError:
            return None  # a version of `gto register` has no record

    def _experiment(self, name: str, commit: str, created: int) -> Run:
        warnings: list[str] = []
        texts: dict[str, str] = {}
        for path in (self.paths.params.name, self.paths.metrics.name):
            try:
                texts[path] = self.git.show(commit, path)
            except GitError:
                warnings.append(f"its commit has no {path}")
        history, samples, more = self._from_dvc(commit)
        return Run(
            id=commit[:10],
            name=name,
            where=f"experiment {commit[:10]}",
            started=datetime.fromtimestamp(created, UTC),
            config=flat(_params(texts.get(self.paths.params.name, "{}"), warnings)),
            summary=flat(_json(texts.get(self.paths.metrics.name, "{}"), warnings)),
            history=history,
            samples=samples,
            warnings=(*warnings, *more),
        )

    def _from_dvc(self, commit: str) -> tuple[dict[str, list[Point]], tuple[Sample, ...], tuple[str, ...]]:
        from dvc.api import DVCFileSystem

        warnings: list[str] = []
        texts: list[str] = []
        # of one of several projects DVC would clone the project's folder, and only the repository around it is one
        system = DVCFileSystem(str(self.git.top), rev=commit, subrepos=bool(self.git.prefix))
        for path in (self.paths.training_log, self.paths.loss_curve, self.paths.samples):
            name = path.relative_to(self.paths.root).as_posix()
            try:
                texts.append(str(system.read_text(f"{self.git.prefix}{name}", encoding="utf-8")))
            except Exception as error:  # DVC raises its own, its filesystems' and its remotes' errors
                texts.append("")
                if path != self.paths.training_log or not isinstance(error, FileNotFoundError):
                    warnings.append(f"{name} is neither in DVC's cache nor in its remote: {error}")
        log, table, samples = texts
        rows: list[Any] = [json.loads(line) for line in log.splitlines()] or _loss_rows(table)
        return series(rows, "step"), tuple(json.loads(samples or "[]")), tuple(warnings)


def _loss_rows(table: str) -> list[dict[str, Any]]:
    """Return the rows of the loss table with the training log's column names."""
    import csv

    rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(table.splitlines())]
    return [{"loss" if name == "train_loss" else name: value for name, value in row.items()} for row in rows]


def _params(text: str, warnings: list[str]) -> dict[str, Any]:
    """Return all parameters with defaults; without defaults if another release wrote them."""
    try:
        values = YAML(typ="safe").load(text)
        if not isinstance(values, Mapping):
            raise ValueError("no sections")
    except (YAMLError, ValueError) as error:
        warnings.append(f"its params.yaml cannot be read: {error}")
        return {}
    try:
        return Params.from_record(values).model_dump()
    except ValueError:
        warnings.append("its params.yaml is another release's; defaults are not filled in")
        return dict(values)


def _json(text: str, warnings: list[str]) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        warnings.append(f"its metrics.json cannot be read: {error}")
        return {}


def _tag(run: Run, otherwise: str) -> Any:
    """Return the run's recorded tag: another project may have a version of the same number."""
    return run.summary.get("registry.tag", otherwise)
