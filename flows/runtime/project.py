"""The git and DVC repository that the pipeline runs in, seen from outside the stages.

Whatever DVC does is done by DVC in a subprocess of this same Python, so that `dvc repro` typed by hand and the
pipeline cannot differ. Nothing here imports torch.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML

from flows.errors import RepositoryError

DVC = (sys.executable, "-m", "dvc")
"""DVC of the environment that runs this, whatever PATH says."""

_PREFECT_ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # a failed stage has said why already; Prefect would add its traceback of it
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    # a first start migrates its database, which takes long on a busy machine
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}


def find_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (the current one) that holds a pipeline: dvc.yaml and .dvc.

    Raises RepositoryError where there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / ".dvc").is_dir():
            return folder
    raise RepositoryError(
        f"no pipeline in {start} or above it (dvc.yaml beside a .dvc folder); "
        "go to a clone of the repository, or make one with `git init`, `dvc init` and a dvc.yaml"
    )


def stage_environment() -> dict[str, str]:
    """This process's environment, with this Python's own folder first in PATH for `cmd: python -m ...`."""
    bin_folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    return {**os.environ, "PATH": os.pathsep.join([bin_folder, path])}


def set_prefect_environment(root: Path) -> None:
    """Make Prefect quiet and keep what it writes in `root`/.prefect; what is set already stays.

    Call it before prefect is imported, because that reads the environment.
    """
    os.environ.setdefault("PREFECT_HOME", str(root / ".prefect"))
    for name, value in _PREFECT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def dvc(root: Path, *arguments: str) -> str:
    """Run one DVC command in `root` and return what it printed. Raises RepositoryError with DVC's reason."""
    done = subprocess.run(
        [*DVC, *arguments], cwd=root, env=stage_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip()
        raise RepositoryError(f"`dvc {' '.join(arguments)}` failed: {reason}")
    return done.stdout


def stage_order(root: Path, output: Path | None = None) -> list[str]:
    """Stage names in an order in which each comes after what it depends on, from DVC's own graph.

    output: only the stages that this one needs.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    try:
        with warnings.catch_warnings(), Repo(str(root)) as repo:
            # DVC uses an old way of its trie library
            warnings.filterwarnings("ignore", "_NoneStep.value", DeprecationWarning)
            graph = repo.index.graph.reverse(copy=True)
            if output is not None:
                (made,) = repo.find_outs_by_path(str(output))
                graph = graph.subgraph({made.stage, *networkx.ancestors(graph, made.stage)})
            stages = networkx.topological_sort(graph)
            # their names, because what DVC calls their addressing depends on the current folder
            return [str(stage.name) for stage in stages if isinstance(stage, PipelineStage)]
    except DvcException as error:
        raise RepositoryError(f"{root / 'dvc.yaml'}: {error}") from error


def changed_stages(root: Path, stages: Sequence[str] = ()) -> dict[str, list[str]]:
    """{stage: what changed since dvc.lock was written, in words}; empty when everything is up to date.

    stages: which to look at, all if none are named. One that runs right now has to be left out: DVC locks its outs.
    """
    status = json.loads(dvc(root, "status", "--json", *stages))
    return {stage: [word for entry in entries for word in _in_words(entry)] for stage, entries in status.items()}


def stage_states(root: Path) -> dict[str, list[str]]:
    """{stage: what changed since it ran, in words}, in the order of work; an empty list is up to date."""
    lock = root / "dvc.lock"
    ran = YAML(typ="safe").load(lock)["stages"] if lock.exists() else {}
    changed = changed_stages(root)
    return {stage: changed.get(stage, []) if stage in ran else ["has not run yet"] for stage in stage_order(root)}


def _in_words(entry: Any, subject: str = "") -> list[str]:
    """DVC's nested status as `modified artifacts/data`, `always changed`."""
    if isinstance(entry, str):
        return [f"{entry} {subject}".strip()]
    return [word for name, value in entry.items() for word in _in_words(value, _inner(subject, name))]


def _inner(subject: str, name: str) -> str:
    """DVC groups what changed below these headings, which say nothing more."""
    return subject if name in ("changed deps", "changed outs") else f"{subject} {name}".strip()


@contextmanager
def files_at(root: Path, commit: str, names: list[str]) -> Iterator[Path]:
    """A temporary folder with DVC outputs as they were at `commit`, at their paths relative to `root`.

    They come from DVC's cache, or from its remote with their hashes checked. Raises RepositoryError.
    """
    with TemporaryDirectory(prefix="peftcore-") as folder:
        for name in names:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            dvc(root, "get", str(root), name, "--rev", commit, "--out", str(target))
        yield Path(folder)
