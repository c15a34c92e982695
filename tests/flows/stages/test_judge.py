"""The process of the judge: its verdicts in a file, or the message of its error."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.params import Judge
from flows.runtime import task as task_process
from flows.stages.judge import measure

PAIR = {"id": "a", "prompt": "Which?", "reference": "r", "candidate": "one", "champion": "two"}


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, judge: Judge) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "judge.py").write_text("def one(prompt, first, second, reference):\n    return 'first'\n")
    task: dict[str, Any] = {"judge": judge.model_dump(), "pairs": [PAIR]}
    task |= {"cache": str(folder / "cache"), "root": str(folder)}
    (folder / "task.json").write_text(json.dumps(task))
    monkeypatch.setattr(sys, "argv", ["judge", str(folder / "task.json"), str(folder / "verdicts.json")])
    monkeypatch.setattr(task_process, "watch_parent", lambda: None)  # the tests must not end with their parent
    task_process.run_task(measure)
    return folder / "verdicts.json"


def test_verdicts_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = json.loads(run(tmp_path, monkeypatch, Judge(callable="data/judge.py:one")).read_text())
    assert [reply["choice"] for reply in written["rows"][0]["replies"]] == ["first", "first"]


def test_an_error_is_written_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, Judge(callable="data/judge.py:two"))
    assert "has no function two" in (tmp_path / "verdicts.txt").read_text()
