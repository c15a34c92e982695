"""A search by Optuna: TPE proposes the parameters of each trial, and trials with bad validation losses are pruned.

The study is an SQLite file. The same command continues an interrupted search. The proposal of a trial depends on the
seed, the number of trials before it and their results only, so an interrupted search ends as an uninterrupted one.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flows.errors import BusyError
from flows.gate.holdout_reuse import note_trial
from flows.params import check_overrides, load_params, source_names
from flows.paths import Paths
from flows.runtime.databases import sqlite_url
from flows.runtime.git import Git
from flows.runtime.inputs import check_source_is_tracked
from flows.runtime.locks import exclusive_if_free
from flows.scaling.ranking import ranked, write_ranking
from flows.scaling.space import Space, read_space
from flows.scaling.trial import Report, SweepSettings, Trial, run_trial, snapshot
from peftcore.errors import require_extra

STARTUP_TRIALS = 4
"""Trials (count) with random parameters and without pruning, at the start."""
WARMUP_EVALUATIONS = 1
"""Evaluations of a trial (count) before it may be pruned."""
_RESULT = "result"

Evaluate = Callable[[tuple[str, ...], Report], Trial]
"""A function that runs the trial of these overrides; it passes each validation loss to the report."""


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        database: the SQLite file of the study.
        name: name of the study in the file.
        trials: number of trials, those of an interrupted search included.
        seed: seed of the proposals.
    """

    database: Path
    name: str
    trials: int
    seed: int

    def run(self, space: Space, evaluate: Evaluate) -> list[Trial]:
        """Run the trials that are left; returns all trials, also earlier ones, in their order.

        Raises:
            BusyError: another process runs this search.
            MissingExtraError: Optuna is not installed.
        """
        with exclusive_if_free(self.database.with_suffix(".lock")) as is_mine:
            if not is_mine:
                raise BusyError(f"busy: another process searches with {self.database}; wait for it, or stop it")
            study = self._study()
            _give_up_killed(study)
            while len(done := _done(study)) < self.trials:
                study.sampler = _sampler(self.seed + len(done))
                _run_one(study, space, evaluate)
            return [_result(one) for one in _done(study)[: self.trials]]

    def _study(self) -> Any:
        optuna = _optuna()
        self.database.parent.mkdir(parents=True, exist_ok=True)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=WARMUP_EVALUATIONS + 1)
        return optuna.create_study(
            storage=sqlite_url(self.database),
            study_name=self.name,
            pruner=pruner,
            direction="minimize",
            load_if_exists=True,
        )


def run_search(
    root: Path, overrides: Sequence[str], trials: int, seed: int | None, stage_timeout: float, limit: str | None = None
) -> list[Trial]:
    """Search for the parameters with the lowest validation loss.

    The study is reports/sweep.sqlite. A search is continued by the same overrides, seed and params.yaml. The report is
    that of a grid: reports/sweep.json and sweep.md.

    Args:
        root: the repository.
        overrides: the space; see `flows.scaling.space`.
        trials: number of trials, one at a time.
        seed: seed of the proposals; None: project.seed.
        stage_timeout: time limit for each stage, in seconds.
        limit: a concurrency limit of Prefect; each trial occupies one slot.

    Returns:
        The trials, best validation loss first, then pruned ones, failed ones last.

    Raises:
        ParamsError: a parameter or a value is invalid; raised before anything runs.
        DataError: neither git nor DVC has the data.
        BusyError: another process runs the search.
        MissingExtraError: Optuna is not installed.
    """
    require_extra("optuna", "peftcore sweep --search optuna", "optuna")
    paths, space = Paths(root), read_space(overrides)
    check_overrides(paths.params, *space.corners())
    params = load_params(paths.params)
    for source in source_names(params.data.model_dump()):
        check_source_is_tracked(Git(root), source, "a search, which works in copies of git's files,")
    seed = params.project.seed if seed is None else seed
    identity = json.dumps([sorted(overrides), seed, paths.params.read_text(encoding="utf-8")])
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    settings = SweepSettings(root, snapshot(root), stage_timeout, limit)

    def evaluate(one: tuple[str, ...], report: Report) -> Trial:
        trial = run_trial(settings, one, report)
        if trial.lock is not None and trial.params is not None:
            note_trial(paths, trial.lock, trial.params)
        return trial

    results = ranked(Search(paths.review.with_name("sweep.sqlite"), name, trials, seed).run(space, evaluate))
    write_ranking(paths, results)
    return results


def _run_one(study: Any, space: Space, evaluate: Evaluate) -> None:
    trial = study.ask(space.searched)

    def report(evaluation: int, loss: float) -> str | None:
        trial.report(loss, evaluation)
        return f"pruned at evaluation {evaluation}, validation loss {loss:.4f}" if trial.should_prune() else None

    result = evaluate(space.overrides(trial.params), report)
    trial.set_user_attr(_RESULT, asdict(result))
    _tell(study, trial.number, result)


def _tell(study: Any, number: int, result: Trial | None) -> None:
    states = _optuna().trial.TrialState
    if result is not None and result.loss is not None:
        study.tell(number, result.loss)
    else:
        pruned = result is not None and result.pruned is not None
        study.tell(number, state=states.PRUNED if pruned else states.FAIL)


def _give_up_killed(study: Any) -> None:
    """End the trial of a killed process. A trial without a result does not count: its parameters are proposed again."""
    states = _optuna().trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        _tell(study, trial.number, _result(trial) if _RESULT in trial.user_attrs else None)


def _done(study: Any) -> list[Any]:
    """Return the trials with a result, in their order."""
    states = _optuna().trial.TrialState
    return [one for one in study.get_trials() if one.state != states.RUNNING and _RESULT in one.user_attrs]


def _result(trial: Any) -> Trial:
    values = trial.user_attrs[_RESULT]
    return Trial(**{**values, "overrides": tuple(values["overrides"])})


def _sampler(seed: int) -> Any:
    optuna = _optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, multivariate=True, seed=seed)


def _optuna() -> Any:
    require_extra("optuna", "peftcore sweep --search optuna", "optuna")
    optuna: Any = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
