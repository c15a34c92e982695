"""Benchmarks of an adapter in a process of its own; `test_evaluate.py` compares them with those of the evaluation."""

import json
import sys
from pathlib import Path

import pytest

from flows.params import Params
from flows.runtime import task as task_process
from flows.stages import reevaluate_benchmarks


@pytest.mark.parametrize("installed", [True, False])
def test_what_cannot_be_measured_leaves_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    params = Params.model_validate({"evaluate": {"benchmarks": ["data/quiz.yaml"]}})
    task = {"params": params.model_dump(), "base": "base", "adapter": "adapter", "root": str(tmp_path)}
    (tmp_path / "task.json").write_text(json.dumps(task))
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(task_process, "watch_parent", lambda: None)  # the tests must not end with their parent
    monkeypatch.setattr(sys, "argv", ["reevaluate", str(tmp_path / "task.json"), str(tmp_path / "benchmarks.json")])
    with pytest.raises(SystemExit) as ended:
        task_process.run_task(reevaluate_benchmarks.measure)
    assert ended.value.code == 1
    reason = (tmp_path / "benchmarks.txt").read_text()
    if installed:
        assert reason == "evaluate.benchmarks, data/quiz.yaml: the file cannot be read; create it and `git add` it"
    else:
        assert reason == "evaluate.benchmarks needs lm_eval; install with: pip install 'peftcore[benchmarks]'"
