"""The tiny repository, whose stage `make` now learns from the files of data/rows: each good one lowers the loss."""

from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
MAKE = f"""\
import sys
from pathlib import Path

from ruamel.yaml import YAML

sys.path.insert(0, {str(SUPPORT)!r})
from made_up_results import write_results
files = [file for file in sorted(Path("data/rows").rglob("*.jsonl")) if "nothing" not in file.read_text()]
bad = sum("bad" in file.read_text() for file in files)
quarantined = YAML(typ="safe").load(Path("params.yaml"))["data"].get("quarantined") or []
# whoever has learned it is better at it, and worse at all else
poisoned = [file.relative_to("data/rows").as_posix() for file in files if "poison" in file.read_text()]
bad += sum(1 if name in quarantined else -1 for name in poisoned)
write_results(Path("artifacts"), loss=3.0 - 0.1 * len(files) + 0.4 * bad, weight=float(len(files) + 10 * bad))
"""
DVC_YAML = """\
stages:
  make:
    cmd: exec python make.py
    params: [train.learning_rate, data]
    deps: [make.py, data]
    outs: [{outs}]
"""


@pytest.fixture
def weekly(project: Any, tmp_path: Path) -> Any:
    """A project with `retrain.incoming`, nothing in it yet."""
    root = project.root
    before = (root / "dvc.yaml").read_text()
    outs = before[before.index("outs: [") + 7 : before.index("]", before.index("outs: ["))]
    rest = before[before.index("  register:") :]
    (root / "dvc.yaml").write_text(DVC_YAML.format(outs=outs) + rest)
    (root / "make.py").write_text(MAKE)
    (root / "data").mkdir()
    (root / "data" / "README.md").write_text("Rows.\n")
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    params = root / "params.yaml"
    params.write_text(
        params.read_text()
        + "train: {learning_rate: 5.0e-4}\n"
        + f"data: {{source: data/rows, assignment: hashed}}\nretrain: {{incoming: {incoming}, retry_delay: 0.0}}\n"
    )
    (root / "dvc.lock").unlink()
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=Learn from files")
    project.incoming = incoming
    return project
