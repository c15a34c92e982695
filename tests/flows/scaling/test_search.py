"""A search by Optuna: seeded, pruned, resumable, and better than a grid on a planted optimum."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.errors import BusyError, ParamsError
from flows.runtime.locks import exclusive_if_free
from flows.scaling import search as module
from flows.scaling.search import Search, run_search
from flows.scaling.space import read_space
from flows.scaling.trial import Report, Trial

pytest.importorskip("optuna", reason="the extra optuna is not part of the environment")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*multivariate")

SPACE = ("train.learning_rate=tag(log,interval(1e-5,1e-1))", "method.lora_dropout=interval(0,0.5)")
EVALUATIONS = 5


def planted(learning_rate: float, dropout: float) -> float:
    """A loss whose optimum is at a learning rate of 7e-4 and a dropout of 0.17."""
    return 2.0 + (math.log10(learning_rate) - math.log10(7e-4)) ** 2 + 8 * (dropout - 0.17) ** 2


def values_of(overrides: tuple[str, ...]) -> tuple[float, float]:
    values = dict(override.split("=") for override in overrides)
    return float(values["train.learning_rate"]), float(values["method.lora_dropout"])


def evaluate(overrides: tuple[str, ...], report: Report) -> Trial:
    """A training whose validation loss falls to the planted one; its work is the number of its evaluations."""
    loss = planted(*values_of(overrides))
    for evaluation in range(1, EVALUATIONS + 1):
        reached = loss + 2.0 * 0.5**evaluation
        if evaluation < EVALUATIONS and (reason := report(evaluation, reached)):
            return Trial(overrides, float(evaluation), pruned=reason)
    return Trial(overrides, float(EVALUATIONS), {"best_validation_loss": loss, "best_step": 5})


def best(trials: list[Trial]) -> float:
    return min(trial.loss for trial in trials if trial.loss is not None)


def search(folder: Path, trials: int = 25, seed: int = 0, name: str = "study") -> Search:
    return Search(folder / "sweep.sqlite", name, trials, seed)


@pytest.mark.slow
def test_with_as_many_trials_as_a_grid_it_comes_nearer_to_a_planted_optimum(tmp_path: Path) -> None:
    rates = [10 ** (-5 + 4 * place / 4) for place in range(5)]
    dropouts = [0.5 * place / 4 for place in range(5)]
    grid = min(planted(*point) for point in itertools.product(rates, dropouts)) - 2.0
    found, work = [], []
    for seed in range(5):
        trials = search(tmp_path, 25, seed, f"seed {seed}").run(read_space(SPACE), evaluate)
        found.append(best(trials) - 2.0)
        work.append(sum(trial.seconds for trial in trials))
    assert sorted(found)[2] < grid / 2, f"excess losses {found}, of the grid {grid}"
    assert max(found) < grid
    assert max(work) < 25 * EVALUATIONS, "pruning saves work"


def test_the_seed_decides(tmp_path: Path) -> None:
    space = read_space(SPACE)
    first, again, other = (
        [trial.overrides for trial in search(tmp_path, 8, seed, name).run(space, evaluate)]
        for seed, name in ((1, "first"), (1, "again"), (2, "other"))
    )
    assert first == again and first != other


def test_an_interrupted_search_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    space = read_space(SPACE)
    whole = search(tmp_path, 10).run(space, evaluate)
    calls = 0

    def interrupted(overrides: tuple[str, ...], report: Report) -> Trial:
        nonlocal calls
        calls += 1
        if calls in (3, 7):
            raise KeyboardInterrupt
        return evaluate(overrides, report)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path, 10, name="interrupted").run(space, interrupted)
    assert search(tmp_path, 10, name="interrupted").run(space, interrupted) == whole
    assert calls == 12, "no trial with a result is run again"
    longer = search(tmp_path, 12, name="interrupted").run(space, evaluate)
    assert longer[:10] == whole and len(longer) == 12


KILLED = """
import os, signal, sys
from pathlib import Path
import test_search as test
from flows.scaling.search import Search
from flows.scaling.space import read_space

seen = []
def evaluate(overrides, report):
    seen.append(overrides)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return test.evaluate(overrides, report)

test.search(Path(sys.argv[1]), 8, 0, "killed").run(read_space(test.SPACE), evaluate)
"""


@pytest.mark.slow
def test_kill_9_loses_at_most_the_trial_that_ran(tmp_path: Path) -> None:
    space = read_space(SPACE)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    assert search(tmp_path, 8, 0, "killed").run(space, evaluate) == search(tmp_path, 8, 0).run(space, evaluate)


def test_bad_trials_are_pruned_and_never_the_best_one(tmp_path: Path) -> None:
    trials = search(tmp_path, 25).run(read_space(SPACE), evaluate)
    pruned = [trial for trial in trials if trial.pruned is not None]
    assert pruned and all(trial.loss is None and trial.seconds < EVALUATIONS for trial in pruned)
    assert min(planted(*values_of(trial.overrides)) for trial in pruned) > best(trials)
    assert all(trial.pruned is None for trial in trials[: module.STARTUP_TRIALS])
    assert pruned[0].pruned is not None and pruned[0].pruned.startswith("pruned at evaluation 2, validation loss ")


def test_a_failed_trial_counts_and_misleads_no_proposal(tmp_path: Path) -> None:
    def failing(overrides: tuple[str, ...], report: Report) -> Trial:
        rate, _ = values_of(overrides)
        return Trial(overrides, 1.0, error="out of memory") if rate > 1e-2 else evaluate(overrides, report)

    trials = search(tmp_path, 20).run(read_space(SPACE), failing)
    assert len(trials) == 20 and any(trial.error for trial in trials) and best(trials) < 2.5


def test_two_processes_do_not_search_at_once(tmp_path: Path) -> None:
    with exclusive_if_free(tmp_path / "sweep.lock"), pytest.raises(BusyError, match="another process searches"):
        search(tmp_path, 2).run(read_space(SPACE), evaluate)


def test_a_search_of_a_repository_writes_the_report_of_a_sweep_and_counts_its_trials(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.make()
    lock, params = (project.root / "dvc.lock").read_text(), project.paths.params.read_text()
    noted = []
    monkeypatch.setattr(module, "note_trial", lambda *arguments: noted.append(arguments))
    monkeypatch.setattr(module, "check_source_is_tracked", lambda *_: None)

    def run_trial(settings: Any, overrides: tuple[str, ...], report: Report) -> Trial:
        trial = evaluate(overrides, report)
        return Trial(trial.overrides, trial.seconds, trial.summary, None, lock, params, trial.pruned)

    monkeypatch.setattr(module, "run_trial", run_trial)
    trials = run_search(project.root, SPACE, 6, None, 60.0)
    records = json.loads((project.root / "reports" / "sweep.json").read_text())
    assert [record["validation_loss"] for record in records] == [trial.loss for trial in trials]
    assert len(records) == 6 and records[0]["validation_loss"] == best(trials)
    assert len(noted) == 6 and (project.root / "reports" / "sweep.sqlite").exists()
    run_search(project.root, SPACE, 6, None, 60.0)
    assert len(noted) == 6, "a finished search runs nothing"
    run_search(project.root, SPACE, 6, 7, 60.0)
    assert len(noted) == 12, "another seed is another search"


def test_a_range_with_an_invalid_end_is_refused_before_anything_runs(project: Any) -> None:
    with pytest.raises(ParamsError, match=r"train\.learning_rate"):
        run_search(project.root, ["train.learning_rate=interval(-1.0,1.0)"], 6, None, 60.0)
