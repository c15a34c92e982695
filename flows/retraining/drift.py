"""How new rows differ from what the champion knows: their lengths, their words, and the champion's loss on them."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows import logs
from flows.errors import StageError
from flows.params import Drift
from flows.project import stage_environment


@dataclass(frozen=True)
class DriftReport:
    """files: {new file: rows, length, divergence, loss, ...}, as `flows.retraining.measure` finds them.

    suspicious: {new file: the limits that it passes, in words}.
    """

    champion: str | None
    champion_loss: float | None
    older: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    suspicious: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Known:
    """The champion: its version, its loss on its own test rows, where its adapter and its classes lie, at their paths
    in a run's folder (None: it is of another base), and the parameters that it is measured with.
    """

    version: str
    loss: float
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
    suspicious = {}
    for name, file in found["files"].items():
        if passed := _passed(file, rule, champion.loss):
            suspicious[name] = passed
    return DriftReport(champion.version, champion.loss, found["older"], found["files"], suspicious)


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
