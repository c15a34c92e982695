"""One run with other parameters, apart from the working tree: what an agent of a W&B sweep starts.

It is a DVC experiment (`dvc exp run --temp`): it shares the cache, so stages whose parameters did not change cost
nothing; it leaves a commit with parameters, metrics and hashes under refs/exps and nothing else, no version and no tag.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.errors import ParamsError, StageError
from flows.git import Git
from flows.params import Params
from flows.paths import Paths
from flows.project import DVC, stage_environment

EXPERIMENTS = "refs/exps/??/*/*"
"""Where DVC keeps experiments: refs/exps/HH/HASH/NAME, by the commit that each began from."""


def run_trial(root: Path, overrides: Sequence[str], name: str | None = None) -> str:
    """Run the pipeline at `root` with overrides such as train.learning_rate=1e-3; returns the experiment's name.

    name: of the experiment; if left out, trial-ID in a sweep, by the id of the agent's W&B run, else DVC's choice.
    Raises ParamsError, before anything runs, if the parameters would not fit; StageError if the run failed.
    """
    check(Paths(root).params, overrides)
    agents = os.environ.get("WANDB_RUN_ID")
    name = name or (f"trial-{agents}" if agents else None)
    command = [*DVC, "exp", "run", "--temp", *(f"--set-param=++{override}" for override in overrides)]
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
    return made[-1].rpartition("/")[2]


def check(params: Path, overrides: Sequence[str]) -> None:
    """Raises ParamsError naming the overrides that do not fit the parameters, as the first stage would later."""
    yaml = YAML(typ="safe")
    tree = yaml.load(params) or {}
    for override in overrides:
        key, is_one, text = override.partition("=")
        try:
            value = yaml.load(text)
        except YAMLError as error:
            raise ParamsError(f"{override}: the value is not valid YAML: {error}") from error
        if not is_one or not key:
            raise ParamsError(f"{override!r} sets nothing; give KEY=VALUE, as train.learning_rate=1e-3")
        _set(tree, key.split("."), value, override)
    try:
        Params.model_validate(tree)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ParamsError(f"{', '.join(overrides)} does not fit {params.name}: {told}") from error


def _set(tree: Any, path: Sequence[str], value: Any, override: str) -> None:
    *sections, last = path
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ParamsError(f"{override}: {section} is a value, with no keys below it")
    tree[last] = float(value) if _is_exponential(value) else value


def _is_exponential(value: Any) -> bool:
    """1e-3, which YAML 1.1 reads as text, and both DVC and people as a number."""
    try:
        return isinstance(value, str) and "e" in value and float(value) is not None
    except ValueError:
        return False


def _experiments(root: Path) -> set[str]:
    return set(Git(root).run("for-each-ref", "--format=%(objectname)/%(refname:lstrip=-1)", EXPERIMENTS).split())
