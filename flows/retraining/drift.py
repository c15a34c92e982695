"""Drift of new rows against the champion's data: lengths, words, and the champion's loss on the new rows."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from pyarrow import parquet

from flows.errors import StageError
from flows.params import Drift
from flows.runtime import logs
from flows.runtime.project import stage_environment


@dataclass(frozen=True)
class DriftReport:
    """The drift of new files.

    Attributes:
        champion: the champion's version.
        champion_loss: its test loss.
        older: statistics of the older rows.
        files: {new file: rows, length, divergence, loss, ...}, from `flows.retraining.measure`.
        suspicious: {new file: the exceeded limits, in words}.
        unsure: {new file: why its drift cannot be judged}.
    """

    champion: str | None
    champion_loss: float | None
    older: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    suspicious: dict[str, str] = field(default_factory=dict)
    unsure: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Known:
    """The champion's facts for measuring drift.

    Attributes:
        version: its number.
        loss: its loss on its own test rows.
        spread: standard deviation of the loss of one row; None if the champion has one test row.
        root: folder with its adapter and classes at a run's paths; None if it has another base.
        params: the parameters to measure it with.
    """

    version: str
    loss: float
    spread: float | None
    root: Path | None
    params: dict[str, Any]


def measure_drift(tree: Path, new_files: list[str], rule: Drift, champion: Known) -> DriftReport:
    """Measure the drift of new files in the working tree `tree`. Raises StageError if the measuring process fails."""
    with TemporaryDirectory(prefix="peftcore-drift-") as folder:
        request, out = Path(folder) / "request.json", Path(folder) / "drift.json"
        champion_request = champion.root and {"root": str(champion.root), "params": champion.params}
        asked = {"new_files": new_files, "rows": rule.rows, "champion": champion_request}
        request.write_text(json.dumps(asked | {"out": str(out)}), encoding="utf-8")
        command = [sys.executable, "-m", "flows.retraining.measure", str(request)]
        # some libraries print to stdout, which is for results
        with logs.streams("drift") as (_, err):
            done = subprocess.run(command, cwd=tree, env=stage_environment(), stdout=err or 2, stderr=err, check=False)
        if done.returncode:
            raise StageError("the drift of the new rows could not be measured; the reason is above")
        measured = json.loads(out.read_text(encoding="utf-8"))
    suspicious, unsure = judged(measured["files"], rule, champion.loss, champion.spread)
    return DriftReport(champion.version, champion.loss, measured["older"], measured["files"], suspicious, unsure)


def judged(
    files: dict[str, dict[str, Any]], rule: Drift, champion_loss: float | None, spread: float | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return (`suspicious`, `unsure`) of a DriftReport.

    A standard error that is estimated from few rows is unreliable. So files with fewer rows than `rule.min_rows` get
    the standard error of as many of the champion's test rows, and are also tested together, as if they were one file.
    If all small files together have fewer rows, they are unsure: wrong labels in two rows would mostly go unnoticed.

    Args:
        files: the measured files; their `loss_error` is set for small files.
        rule: the limits.
        champion_loss: the champion's test loss; None skips the limit on the loss.
        spread: standard deviation of the champion's loss over its test rows. None if there is one: then small files are
            unsure.
    """
    small = [name for name, file in files.items() if "loss" in file and file["measured_rows"] < rule.min_rows]
    for name in small:
        files[name]["loss_error"] = math.nan if spread is None else spread / files[name]["measured_rows"] ** 0.5
    suspicious = {name: passed for name, file in files.items() if (passed := _passed(file, rule, champion_loss))}
    if not small or rule.max_loss_gap is None:
        return suspicious, {}
    if spread is None:
        why = "its drift cannot be judged: the champion has one test row, so the spread of its losses is unknown"
        return suspicious, dict.fromkeys(small, why)
    together = _together([files[name] for name in small], spread)
    if together["measured_rows"] < rule.min_rows:
        why = f"too few rows to judge ({together['measured_rows']} in all small files, {rule.min_rows} are needed)"
        return suspicious, dict.fromkeys(small, why)
    if passed := _passed(together, rule, champion_loss):
        suspicious |= {name: f"with other small files, {passed}" for name in small if name not in suspicious}
    return suspicious, {}


def spread_of(rows: Path) -> float | None:
    """Return the standard deviation of the loss over the rows of an evaluation's table; None of a single row."""
    losses = parquet.read_table(rows, columns=["adapter_loss"])["adapter_loss"].to_numpy()
    return float(numpy.std(losses, ddof=1)) if len(losses) > 1 else None


def _together(files: list[dict[str, Any]], spread: float) -> dict[str, Any]:
    """Return rows, loss and standard error of several files as if they were one. spread: std of one row's loss."""
    rows, weight = (sum(file[key] for file in files) for key in ("measured_rows", "loss_weight"))
    loss = sum(file["loss"] * file["loss_weight"] for file in files) / weight
    return {"measured_rows": rows, "loss": loss, "loss_error": spread / rows**0.5}


def _passed(file: dict[str, Any], rule: Drift, champion_loss: float | None) -> str | None:
    """Return the exceeded limits in words. The loss counts minus twice its standard error."""
    words = []
    if rule.max_loss_gap is not None and champion_loss is not None and "loss" in file:
        gap = file["loss"] - champion_loss
        if gap - 2 * file["loss_error"] > rule.max_loss_gap:
            words.append(f"the champion's loss is {gap:+.2f} nats above its test loss, at most {rule.max_loss_gap:g}")
    if rule.max_divergence is not None and file.get("divergence", 0.0) > rule.max_divergence:
        words.append(f"its words diverge by {file['divergence']:.2f}, at most {rule.max_divergence:g}")
    return "; ".join(words) or None
