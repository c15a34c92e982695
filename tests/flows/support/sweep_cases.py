"""A stage for tests of sweeps, and a record of its work."""

from typing import Any

SWEPT_STAGE = """\
import json, shutil
from pathlib import Path
from ruamel.yaml import YAML

train = YAML(typ="safe").load(Path("params.yaml"))["train"]
if train["batch_size"] == 3:
    raise SystemExit("error: three is refused")
shutil.copytree("source", "artifacts", dirs_exist_ok=True)
path = Path("artifacts/training/summary.json")
summary = json.loads(path.read_text())
summary["best_validation_loss"] = 2.0 + abs(train["learning_rate"] - 0.002) * 100 + 0.01 * train["batch_size"]
path.write_text(json.dumps(summary))
with open(SHARED, "a") as worked:
    print(train["learning_rate"], train["batch_size"], file=worked)
"""
"""A stage whose validation loss depends on two parameters; it refuses a batch of three, and notes each of its runs."""


def worked(project: Any) -> list[str]:
    """The parameters with which the stage really ran, in the order in which it ended."""
    path = project.root.parent / "worked"
    return path.read_text().splitlines() if path.exists() else []
