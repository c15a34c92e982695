"""`peftcore sweep`: the options that reach the trials, the table of them, and the exit code of a failed one."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import peftcore

from flows.scaling.ranking import write_ranking
from flows.scaling.trial import Trial

GOOD = Trial(("train.batch_size=4",), 1.5, {"best_validation_loss": 2.5, "best_step": 4})
BAD = Trial(("train.batch_size=3",), 0.5, error="stage train failed [/]: no memory\nmore")


@pytest.fixture
def trials(project: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trials that the sweep comes to; after the command, its options are the last item."""
    result: list[Any] = [GOOD]

    def run_sweep(root: Path, *options: Any) -> list[Trial]:
        ranked = list(result)
        write_ranking(project.paths, ranked)
        result.append((root, *options))
        return ranked

    monkeypatch.setattr("flows.scaling.sweep.run_sweep", run_sweep)
    monkeypatch.chdir(project.root / "source")
    return result


def test_each_option_reaches_the_sweep(project: Any, trials: list[Any]) -> None:
    options = ["--runner", "process", "--jobs", "3", "--limit", "gpu", "--stage-timeout", "60"]
    done = peftcore("sweep", "-S", "train.batch_size=4,3", "--set-param", "method.r=2", *options)
    assert done.exit_code == 0, done.stderr
    assert trials[-1] == (project.root, ["train.batch_size=4,3", "method.r=2"], "process", 3, 60.0, "gpu")


def test_the_trials_are_a_table_and_a_failed_one_is_exit_code_1(trials: list[Any]) -> None:
    trials.append(BAD)
    done = peftcore("sweep", "-S", "train.batch_size=4,3")
    assert done.exit_code == 1
    (good,) = [line for line in done.stdout.splitlines() if "batch_size=4" in line]
    (bad,) = [line for line in done.stdout.splitlines() if "batch_size=3" in line]
    assert "2.5000" in good and "1.5" in good
    assert "stage train failed [/]: no memory" in bad and "more" not in bad
    assert done.stderr.startswith("error: 1 of 2 trials failed; the last: stage train failed [/]: no memory")


def test_json_is_the_file_that_the_sweep_wrote(project: Any, trials: list[Any]) -> None:
    done = peftcore("sweep", "-S", "train.batch_size=4", "--json")
    assert done.stdout == (project.root / "reports" / "sweep.json").read_text()
    assert json.loads(done.stdout)[0]["validation_loss"] == 2.5


@pytest.mark.parametrize("arguments", [[], ["-S", "a=1", "--runner", "slurm"], ["-S", "a=1", "--jobs", "0"]])
def test_what_cannot_be_swept_is_a_usage_error(trials: list[Any], arguments: list[str]) -> None:
    assert peftcore("sweep", *arguments).exit_code == 2
    assert trials == [GOOD], "no trial began"
