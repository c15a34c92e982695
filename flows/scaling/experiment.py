"""One run with other parameters, apart from the working tree: `peftcore trial`, as an agent of a W&B sweep starts it.

It is a DVC experiment (`dvc exp run --temp`): it shares the cache, so stages whose parameters did not change cost
nothing; it leaves a commit with parameters, metrics and hashes under refs/exps and nothing else, no version and no tag.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from flows.errors import StageError
from flows.gate.holdout_reuse import note_trial
from flows.params.model import load_params
from flows.params.overrides import check_overrides, forced
from flows.paths import Paths
from flows.runtime.git import Git
from flows.runtime.inputs import check_source_is_tracked
from flows.runtime.project import DVC, stage_environment

EXPERIMENTS = "refs/exps/??/*/*"
"""Where DVC keeps experiments: refs/exps/HH/HASH/NAME, by the commit that each began from."""


def run_experiment(root: Path, overrides: Sequence[str], name: str | None = None) -> str:
    """Run the pipeline at `root` with overrides such as train.learning_rate=1e-3; returns the experiment's name.

    name: of the experiment; if left out, trial-ID in a sweep, by the id of the agent's W&B run, else DVC's choice.
    Raises ParamsError, before anything runs, if the parameters would not fit, DataError if git and DVC do not have the
    data; StageError if the run failed.
    """
    check_overrides(Paths(root).params, overrides)
    source = load_params(Paths(root).params).data.source
    check_source_is_tracked(Git(root), source, "a trial, which works in a copy of git's files,")
    agents = os.environ.get("WANDB_RUN_ID")
    name = name or (f"trial-{agents}" if agents else None)
    command = [*DVC, "exp", "run", "--temp", *(f"--set-param={forced(override)}" for override in overrides)]
    before = _experiments(root)
    done = subprocess.run(
        [*command, *(["--name", name] if name else [])], cwd=root, env=stage_environment(), check=False
    )
    made = sorted(_experiments(root) - before)
    if done.returncode or not made:
        raise StageError(
            f"the trial with {', '.join(overrides) or 'no other parameters'} failed, and said why above; "
            "`dvc exp show` has those that did not"
        )
    commit, _, made_name = made[-1].rpartition("/")
    git = Git(root)
    note_trial(Paths(root), git.show(commit, "dvc.lock"), git.show(commit, "params.yaml"))
    return made_name


def _experiments(root: Path) -> set[str]:
    return set(Git(root).run("for-each-ref", "--format=%(objectname)/%(refname:lstrip=-1)", EXPERIMENTS).split())
