"""A task's process: its result in a file, or the message of a known error."""

import json
import sys
from pathlib import Path

import pytest

from flows.errors import StageError
from flows.runtime import task
from peftcore.errors import ConfigError


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "task.json").write_text(json.dumps({"rows": 3}))
    monkeypatch.setattr(task, "watch_parent", lambda: None)  # the tests' process must not end with its parent
    monkeypatch.setattr(sys, "argv", ["measure", str(tmp_path / "task.json"), str(tmp_path / "result.json")])
    return tmp_path / "result.json"


def test_the_result_is_written(output: Path) -> None:
    task.run_task(lambda request: {"measured": request["rows"] + 1})
    assert json.loads(output.read_text()) == {"measured": 4}
    task.run_task(lambda request: str(request["rows"]), lambda result, path: path.write_text(result))
    assert output.read_text() == "3"


@pytest.mark.parametrize("error", [StageError("no rows"), ConfigError("no rank")])
def test_a_known_error_leaves_its_message(output: Path, error: Exception) -> None:
    def fail(_: object) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        task.run_task(fail)
    assert ended.value.code == 1 and not output.exists()
    assert output.with_suffix(".txt").read_text() == str(error)


def test_a_defect_keeps_its_traceback(output: Path) -> None:
    with pytest.raises(KeyError):
        task.run_task(lambda request: request["absent"])
    assert not output.with_suffix(".txt").exists()
