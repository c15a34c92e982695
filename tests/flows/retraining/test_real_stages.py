"""Two weeks with the real stages on a tiny base: anew, then on from the champion with replay; with calibration, too.

The first week is the command in a process of its own, with Prefect. Later ones are the command in this process without
Prefect's server, and DVC is forked; their stages are processes all the same.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from command_line import peftcore
from ruamel.yaml import YAML

from flows.retraining import flow

pytestmark = [pytest.mark.proof, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[3]
SMALL: dict[str, dict[str, Any]] = {
    "data": {"source": "data/rows", "assignment": "hashed", "group_column": "book", "train_rows": None,
             "validation_rows": 8, "test_rows": None, "validation_share": 0.15, "test_share": 0.3},
    "method": {"r": 4, "lora_alpha": 8},
    "train": {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 0.01, "evaluations": 2},
    "evaluate": {"rows": None, "batch_size": 8, "generate_rows": 4, "max_new_tokens": 8, "samples": 2},
    "merge": {"rows": 6, "max_kl": 1.0, "min_top1_agreement": 0.5},
    "gate": {"min_loss_gain": 0.05, "min_rouge_l_gain": -1.0, "min_eos_rate": 0.0},
    "tracking": {"mode": "disabled"},
}  # fmt: skip


@pytest.fixture(params=["none", "rounding"])
def clone(request: pytest.FixtureRequest, tmp_path: Path, write_tiny_base: Callable[[Path], Path]) -> Path:
    root = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(ROOT), str(root)], check=True)
    (tmp_path / "incoming").mkdir()
    yaml = YAML()
    params = yaml.load(root / "params.yaml")
    given = SMALL | {"base": {"source": f"path:{write_tiny_base(tmp_path / 'base')}"}}
    given |= {"retrain": {"incoming": str(tmp_path / "incoming"), "start": "champion", "on": "any", "retry_delay": 0.0}}
    if request.param != "none":  # 4 bits are rounded in blocks of 64 inputs, and the tiny base has 32
        given |= {"quantization": {"storage": "int8", "calibration": {"method": request.param}}}
    for section, values in given.items():
        params[section].update(values)
    params["gate"]["slices"]["max_loss_regression"] = None
    yaml.dump(params, root / "params.yaml")
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--all", "--message=Small"], cwd=root, check=True)
    return root


def retrain_in_a_process(root: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "flows.cli", "retrain", "--json"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def retrain(clone: Path, forked_stages: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """The command in this process, in the clone; Prefect's server cannot be reached."""

    def unreachable(*_: object) -> NoReturn:
        raise httpx.ConnectError("Connection refused")

    def command() -> dict[str, Any]:
        done = peftcore("retrain", "--json")
        assert done.exit_code in (0, 3), done.stderr
        return json.loads(done.stdout)

    monkeypatch.setattr(flow, "tied_temporary_server", unreachable)
    monkeypatch.chdir(clone)
    return command


def drop(root: Path, name: str, numbers: range) -> None:
    rows = [{"prompt": f"How much is {n} and 1?", "completion": f"{n + 1}.", "book": f"book{n // 4}"} for n in numbers]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root.parent / "incoming" / f"{name}.jsonl").write_text(text)


def test_two_weeks(clone: Path, retrain: Callable[[], dict[str, Any]]) -> None:
    drop(clone, "week1", range(120))
    first = retrain_in_a_process(clone)
    assert (first["outcome"], first["version"], first["drift"]) == ("promoted", "v0.1.0", None)
    assert retrain()["outcome"] == "unchanged"

    drop(clone, "week2", range(120, 240))
    second = retrain()
    assert second["start"] == "v0.1.0"
    assert second["new_files"] == ["week2.jsonl"]
    assert second["version"] == "v0.2.0", "other test rows than v0.1.0's make a minor step"
    drift = second["drift"]
    assert drift["champion"] == "v0.1.0"
    assert drift["files"]["week2.jsonl"]["loss"] > 0
    # the champion was measured again on the new test rows, and the one that went on from it is better there
    checks = {check["name"]: check for check in second["promotion"]["report"]["checks"]}
    assert "re-evaluated" in checks["against the champion"]["detail"]
    assert second["outcome"] == "promoted", second["reason"]
    assert retrain()["outcome"] == "unchanged", "that it started from v0.1.0 is no change of parameters"
