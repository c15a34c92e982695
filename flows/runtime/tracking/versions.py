"""Mirroring of what happens to a version after its training: evaluation, registration and promotion."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from flows.params import Params
from flows.paths import Paths
from flows.runtime.tracking.folders import lasting_folder
from flows.runtime.tracking.mlflow_run import MlflowRun, set_alias
from flows.runtime.tracking.tracker import Backend, Tracker
from flows.runtime.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)


class Holder(Protocol):
    """Holder of a stage of the registry."""

    @property
    def version(self) -> str | None:
        """Number of the holding version."""
        ...


def tracked_runs(record: Mapping[str, Any]) -> dict[Backend, str]:
    """Return {backend: id of the training run} of a version's record."""
    runs = {"wandb": record.get("wandb_run_id"), **record.get("tracking_runs", {})}
    return {backend: run for backend, run in runs.items() if run is not None}


def mirror_version(
    params: Params, paths: Paths, record: Mapping[str, Any], commit: str | None, stages: Mapping[str, Holder]
) -> None:
    """Mirror evaluation and registration to the backends that have the training run.

    Args:
        params: The parameters of the run.
        paths: The project's files.
        record: The version's record.
        commit: Commit of the version's tag; None for a trial, which is no version: only its evaluation is mirrored.
        stages: Holders of the registry's stages before the version's promotion.
    """
    tracking, version, trained = params.tracking, record["version"], tracked_runs(record)
    backends: list[Backend] = [backend for backend in tracking.backends if backend in trained]
    if not backends:
        return
    tracker = Tracker(
        tracking.project,
        tracking.mode,
        record["params"],
        paths.root,
        trained.get("wandb"),
        f"{record['name']} {'trial' if commit is None else version}",
        backends,
        tracking.mlflow_uri,
        trained,
    )
    champion = stages.get(params.gate.stage)
    link = {
        "name": record["name"],
        "version": version,
        "tag": f"{record['name']}@{version}",
        "commit": commit,
        "champion_then": None if champion is None else champion.version,
    }
    try:
        slices = json.loads(paths.evaluation_metrics.read_text(encoding="utf-8"))["slices"]
        tracker.table("samples", json.loads(paths.samples.read_text(encoding="utf-8")))
        if paths.evaluation_suites.exists():
            tracker.table("suites", _suite_rows(json.loads(paths.evaluation_suites.read_text(encoding="utf-8"))))
        tracker.table("slices", ({"slice": name, **figures} for name, figures in slices.items()))
        if commit is None:
            tracker.finish(dict(record["metrics"]))
        else:
            tracker.register(record, commit, paths.adapter)
            tracker.finish({**record["metrics"], "registry": link}, paths.adapter)
    except (OSError, ValueError, KeyError) as error:
        log.warning("the evaluation is not mirrored: %s", error)
    finally:
        tracker.close()


def mirror_promotion(
    params: Params,
    root: Path,
    record: Mapping[str, Any],
    adapter: Callable[[], AbstractContextManager[Path]],
) -> None:
    """Mirror that a version got the stage `gate.stage`: MLflow's alias, and a link in W&B's registry.

    Args:
        params: The parameters.
        root: The repository.
        record: The version's record.
        adapter: Gives the folder of the version's adapter; called only if files are uploaded.
    """
    tracking, stage, trained = params.tracking, params.gate.stage, tracked_runs(record)
    name, version = record["name"], record["version"]
    if tracking.mode == "disabled":
        return
    root = lasting_folder(root)
    if "mlflow" in tracking.backends and "mlflow" in trained:
        try:
            set_alias(tracking.mlflow_uri, root, name, version, stage)
        except Exception as error:  # MLflow's, the network's and the disk's errors
            log.warning("%s: %s; the promotion is done, and the alias %s is not set", MlflowRun.label, error, stage)
    registry = tracking.wandb_registry
    if "wandb" in tracking.backends and tracking.mode == "online" and registry is not None and "wandb" in trained:
        try:
            with adapter() as folder:
                _link(params, root, record, registry, folder)
        except Exception as error:  # wandb's, the network's and the disk's errors
            log.warning("%s: %s; the promotion is done, and no link is made", WandbRun.label, error)


def mirror_judgement(params: Params, paths: Paths, record: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Mirror the judge's figures, and its verdicts as a table, to the backends that have the training run.

    Args:
        params: The parameters.
        paths: The project's files, with the verdicts.
        record: The judged version's record.
        figures: The figures of the gate's check.
    """
    tracking, trained, name = params.tracking, tracked_runs(record), f"{record['name']} {record['version']} judge"
    backends: list[Backend] = [backend for backend in tracking.backends if backend in trained]
    if not backends:
        return
    tracker = Tracker(
        tracking.project,
        tracking.mode,
        {"version": record["version"]},
        paths.root,
        trained.get("wandb"),
        name,
        backends,
        tracking.mlflow_uri,
        trained,
    )
    try:
        tracker.table("judge_verdicts", _judge_rows(json.loads(paths.judgement.read_text(encoding="utf-8"))["rows"]))
        tracker.finish({"judge": figures})
    except (OSError, ValueError, KeyError) as error:
        log.warning("the judge's verdicts are not mirrored: %s", error)
    finally:
        tracker.close()


def _judge_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one row per judged prompt; the choices are None for equal answers."""
    for row in rows:
        choices = [reply["choice"] for reply in row["replies"]] or [None, None]
        shown = {key: row[key] for key in ("id", "prompt", "reference", "candidate", "champion", "outcome")}
        yield shown | {"candidate_first": choices[0], "champion_first": choices[1]}


def _suite_rows(suites: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one row per answer to a prompt suite; the column `failed` is empty if the answer passes."""
    for name, suite in suites.items():
        for prompt in suite["prompts"]:
            for answer in prompt["answers"]:
                shown = {
                    "suite": name,
                    "id": prompt["id"],
                    "prompt": prompt["prompt"],
                    "must": "; ".join(prompt["must"]),
                }
                failed = "; ".join(answer["failed"].values())
                yield shown | {"seed": answer["seed"], "answer": answer["text"], "failed": failed}


def _link(params: Params, root: Path, record: Mapping[str, Any], registry: str, adapter: Path) -> None:
    name, version, stage = record["name"], record["version"], params.gate.stage
    run = WandbRun(
        params.tracking.project,
        "online",
        {"version": version},
        root,
        tracked_runs(record)["wandb"],
        f"{name} {version} {stage}",
        "promote",
    )
    metadata = {"version": version, "tag": f"{name}@{version}", "adapter_sha256": record["adapter"]["content"]}
    failed = True
    try:
        run.link(registry, name, adapter, metadata, [stage, version])
        failed = False
    finally:
        run.close(failed)
