"""A trial: one run with other parameters, outside of the working tree. Agents of a W&B sweep start trials too.

A trial is a DVC experiment (`dvc exp run --temp`). It shares DVC's cache, so unchanged stages cost nothing. It leaves a
commit with parameters, metrics and hashes under refs/exps, and neither a version nor a tag.
"""

import os
import secrets
import subprocess
from collections.abc import Sequence
from pathlib import Path

from flows.errors import StageError
from flows.gate.holdout_reuse import note_trial
from flows.params import check_overrides, forced, load_params, source_names
from flows.paths import Paths
from flows.runtime.git import Git
from flows.runtime.inputs import check_source_is_tracked
from flows.runtime.project import DVC, stage_environment

EXPERIMENTS = "refs/exps/??/*/*"
"""References of DVC's experiments: refs/exps/HH/HASH/NAME, with the hash of the experiment's start commit."""


def run_experiment(root: Path, overrides: Sequence[str], name: str | None = None) -> str:
    """Run the pipeline at `root` with other parameters.

    Args:
        root: the repository.
        overrides: parameters such as train.learning_rate=1e-3.
        name: the experiment's name; None: trial-ID, with the id of the agent's run in a W&B sweep, else a random one.

    Returns:
        The experiment's name.

    Raises:
        ParamsError: a parameter is invalid; raised before anything runs.
        DataError: neither git nor DVC has the data.
        StageError: the run failed.
    """
    check_overrides(Paths(root).params, overrides)
    for source in source_names(load_params(Paths(root).params).data.model_dump()):
        check_source_is_tracked(Git(root), source, "a trial, which works in a copy of git's files,")
    name = name or f"trial-{os.environ.get('WANDB_RUN_ID') or secrets.token_hex(4)}"
    git = Git(root)
    start = git.head()
    reference = f"refs/exps/{start[:2]}/{start[2:]}/{name}"
    if git.run("for-each-ref", reference).strip():  # DVC would find out after the run
        raise StageError(
            f"the experiment {name} of this commit exists already; give another --name, or remove it first: "
            f"dvc exp remove {name}"
        )
    command = [*DVC, "exp", "run", "--temp", "--name", name]
    command += [f"--set-param={forced(override)}" for override in overrides]
    done = subprocess.run(command, cwd=root, env=stage_environment(), check=False)
    commit = git.run("for-each-ref", "--format=%(objectname)", reference).strip()
    if done.returncode or not commit:
        raise StageError(
            f"the trial with {', '.join(overrides) or 'no other parameters'} failed, see its error above; "
            "`dvc exp show` lists the successful ones"
        )
    note_trial(Paths(root), git.show(commit, "dvc.lock"), git.show(commit, "params.yaml"))
    return name
