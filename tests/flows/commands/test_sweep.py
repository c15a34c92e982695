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


def test_a_long_value_is_shown_whole(trials: list[Any]) -> None:
    value = "train.learning_rate=0.0001329291894316216"
    trials[0] = Trial((value, "method.r=8"), 1.5, {"best_validation_loss": 2.5, "best_step": 4})
    shown = peftcore("sweep", "-S", "method.r=8", COLUMNS="80").stdout
    column = [line.split("│")[2].strip() for line in shown.splitlines() if line.count("│") > 2]
    assert value in "".join(column)


def test_json_is_the_file_that_the_sweep_wrote(project: Any, trials: list[Any]) -> None:
    done = peftcore("sweep", "-S", "train.batch_size=4", "--json")
    assert done.stdout == (project.root / "reports" / "sweep.json").read_text()
    assert json.loads(done.stdout)[0]["validation_loss"] == 2.5


@pytest.mark.parametrize("arguments", [[], ["-S", "a=1", "--runner", "slurm"], ["-S", "a=1", "--jobs", "0"]])
def test_what_cannot_be_swept_is_a_usage_error(trials: list[Any], arguments: list[str]) -> None:
    assert peftcore("sweep", *arguments).exit_code == 2
    assert trials == [GOOD], "no trial began"


PRUNED = Trial(("train.batch_size=2",), 0.7, pruned="pruned at evaluation 2, validation loss 3.1000")


def test_each_option_reaches_a_search_and_a_pruned_trial_has_not_failed(
    project: Any, trials: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_search(root: Path, *options: Any) -> list[Trial]:
        asked.append((root, *options))
        return [GOOD, PRUNED]

    monkeypatch.setattr("flows.scaling.search.run_search", run_search)
    options = ["--search", "optuna", "--trials", "7", "--seed", "3", "--limit", "gpu", "--stage-timeout", "60"]
    done = peftcore("sweep", "-S", "train.batch_size=range(2,9)", *options)
    assert done.exit_code == 0, done.stderr
    assert asked == [(project.root, ["train.batch_size=range(2,9)"], 7, 3, 60.0, "gpu")]
    assert "pruned at evaluation 2" in done.stdout
    assert peftcore("sweep", "-S", "train.batch_size=2,3", "--search", "optuna").exit_code == 0
    assert asked[-1][2:4] == (20, None)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--trials", "3"], "give --search optuna too"),
        (["--seed", "3"], "give --search optuna too"),
        (["--search", "optuna", "--jobs", "2"], "leave --jobs and --runner out"),
        (["--search", "optuna", "--runner", "ray"], "leave --jobs and --runner out"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(trials: list[Any], options: list[str], advice: str) -> None:
    done = peftcore("sweep", "-S", "train.batch_size=4,3", *options)
    assert done.exit_code == 2 and advice in done.stderr and trials == [GOOD]
