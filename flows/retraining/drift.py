"""How new rows differ from what the champion knows: their lengths, their words, and the champion's loss on them."""

import json
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
    """files: {new file: rows, length, divergence, loss, ...}, as `flows.retraining.measure` finds them.

    suspicious: {new file: the limits that it passes, in words}. unsure: {new file: why nothing can be told of it}.
    """

    champion: str | None
    champion_loss: float | None
    older: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    suspicious: dict[str, str] = field(default_factory=dict)
    unsure: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Known:
    """The champion: its version, its loss on its own test rows and the standard deviation of a row's, where its adapter
    and its classes lie, at their paths in a run's folder (None: it is of another base), and the parameters that it is
    measured with.
    """

    version: str
    loss: float
    spread: float
    root: Path | None
    params: dict[str, Any]


def measure_drift(tree: Path, fresh: list[str], rule: Drift, champion: Known) -> DriftReport:
    """Measure new files in the working tree `tree`. Raises StageError if the measuring process fails."""
    with TemporaryDirectory(prefix="peftcore-drift-") as folder:
        request, out = Path(folder) / "request.json", Path(folder) / "drift.json"
        known = champion.root and {"root": str(champion.root), "params": champion.params}
        asked = {"fresh": fresh, "rows": rule.rows, "champion": known}
        request.write_text(json.dumps(asked | {"out": str(out)}))
        command = [sys.executable, "-m", "flows.retraining.measure", str(request)]
        # libraries greet on stdout, which is for results
        with logs.streams("drift") as (_, err):
            done = subprocess.run(command, cwd=tree, env=stage_environment(), stdout=err or 2, stderr=err, check=False)
        if done.returncode:
            raise StageError("the drift of the new rows could not be measured; the reason is above")
        found = json.loads(out.read_text())
    suspicious, unsure = judged(found["files"], rule, champion.loss, champion.spread)
    return DriftReport(champion.version, champion.loss, found["older"], found["files"], suspicious, unsure)


def judged(
    files: dict[str, dict[str, Any]], rule: Drift, champion_loss: float | None, spread: float
) -> tuple[dict[str, str], dict[str, str]]:
    """Return (`suspicious`, `unsure`) of a DriftReport; files get the standard error that they are judged by.

    The loss of a few rows says little, and its own standard error less. Files with fewer rows than the rule asks for
    get the standard error of as many rows that are such as the champion knows, and are also judged as if they were one.
    Where they are too few even so, nothing is judged by them: a shuffled file of two rows is mostly not found.
    """
    small = [name for name, file in files.items() if "loss" in file and file["measured_rows"] < rule.min_rows]
    for name in small:
        files[name]["loss_error"] = spread / files[name]["measured_rows"] ** 0.5
    suspicious = {name: passed for name, file in files.items() if (passed := _passed(file, rule, champion_loss))}
    if not small or rule.max_loss_gap is None:
        return suspicious, {}
    together = _together([files[name] for name in small], spread)
    if together["measured_rows"] < rule.min_rows:
        told = f"its rows are too few to tell ({together['measured_rows']} in all small files, {rule.min_rows} do)"
        return suspicious, dict.fromkeys(small, told)
    if passed := _passed(together, rule, champion_loss):
        suspicious |= {name: f"with other small files, {passed}" for name in small if name not in suspicious}
    return suspicious, {}


def spread_of(rows: Path) -> float:
    """Return the standard deviation of a row's loss, of an evaluation's table."""
    return float(numpy.std(parquet.read_table(rows, columns=["adapter_loss"])["adapter_loss"].to_numpy(), ddof=1))


def _together(files: list[dict[str, Any]], spread: float) -> dict[str, Any]:
    """Files as if they were one."""
    rows, weight = (sum(file[key] for file in files) for key in ("measured_rows", "loss_weight"))
    loss = sum(file["loss"] * file["loss_weight"] for file in files) / weight
    return {"measured_rows": rows, "loss": loss, "loss_error": spread / rows**0.5}


def _passed(file: dict[str, Any], rule: Drift, champion_loss: float | None) -> str | None:
    """The limits that a file passes, in words. Of the loss its standard error is taken off before it is judged."""
    words = []
    if rule.max_loss_gap is not None and champion_loss is not None and "loss" in file:
        gap = file["loss"] - champion_loss
        if gap - 2 * file["loss_error"] > rule.max_loss_gap:
            words.append(f"the champion's loss is {gap:+.2f} nats above its test loss, at most {rule.max_loss_gap:g}")
    if rule.max_divergence is not None and file.get("divergence", 0.0) > rule.max_divergence:
        words.append(f"its words diverge by {file['divergence']:.2f}, at most {rule.max_divergence:g}")
    return "; ".join(words) or None
