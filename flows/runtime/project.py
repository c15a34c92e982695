"""The git and DVC repository of the pipeline, as seen from outside the stages.

DVC runs as a subprocess of the same Python, so the pipeline and a manual `dvc repro` behave alike. Nothing here imports
torch.
"""

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from flows.errors import RepositoryError
from flows.paths import from_here
from flows.runtime.databases import sqlite_url
from flows.runtime.git import environment_without_locations, git_output
from flows.runtime.temporary import temporary_folder

if TYPE_CHECKING:
    from dvc.repo import Repo

DVC = (sys.executable, "-m", "dvc")
"""DVC of the running environment, independent of PATH."""
_SUPPORT = "Having any troubles? Hit us up at https://dvc.org/support, we are always happy to help!"
"""Last line of some of DVC's messages."""
_ADVICE = {
    os.strerror(errno.EROFS): "DVC writes locks also for reading; work in a clone on a disk that can be written",
    os.strerror(errno.ENOSPC): "free some space, such as by `peftcore registry gc`, and run it again; existing files "
    "are intact",
    # a full disk leaves an empty one
    "dvc.lock'": "restore it by `git checkout {lock}`, or remove it if git does not have it, and run it again",
}
"""{text in a message of DVC: what to do}; {lock} is the path of dvc.lock."""

_PREFECT_ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # a failed stage has printed its error; Prefect would add a traceback
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    # the first start migrates the database, which is slow on a busy machine
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}


def find_root(start: Path | None = None) -> Path:
    """Return the nearest folder at or above `start` (default: the current one) with a pipeline: dvc.yaml and .dvc.

    Raises:
        RepositoryError: There is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / ".dvc").is_dir():
            return folder
    raise RepositoryError(
        f"no pipeline in {start} or above it (dvc.yaml beside a .dvc folder); "
        "go to the folder of a project, or make this one with `peftcore init`"
    )


PROJECTS = "projects"
"""Folder at the top of a git repository with several projects, each in a folder of its own."""


def project_roots(start: Path | None = None) -> list[Path]:
    """Return the projects of the git repository around `start` (default: the current folder), by name.

    A project is a folder in `projects`, or the top of the repository, with dvc.yaml and .dvc.

    Raises:
        RepositoryError: There is no git repository or no project.
    """
    start = (start or Path.cwd()).resolve()
    top = Path(git_output(start, "rev-parse", "--show-toplevel").strip())
    folders = [top, *sorted((top / PROJECTS).glob("*"))]
    roots = [folder for folder in folders if (folder / "dvc.yaml").is_file() and (folder / ".dvc").is_dir()]
    if not roots:
        raise RepositoryError(
            f"{top} has no project, neither here nor in {PROJECTS}/; make one with `peftcore init {PROJECTS}/NAME`"
        )
    return roots


def is_experiment(root: Path) -> bool:
    """Return True in the copy of a repository that DVC makes for an experiment; its tags vanish with the copy."""
    return "/.dvc/tmp/exps/" in f"{root.resolve().as_posix()}/"


def stage_environment() -> dict[str, str]:
    """Return the environment of stages and of DVC: without LOCATIONS of git, and this Python's folder first in PATH.

    The latter is for `cmd: python -m ...`.
    """
    bin_folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    return {**environment_without_locations(), "PATH": os.pathsep.join([bin_folder, path])}


def set_prefect_environment(root: Path) -> None:
    """Silence Prefect and keep its files in `root`/.prefect; existing variables do not change.

    Call this before the import of prefect, which reads the environment.
    """
    if "PREFECT_HOME" not in os.environ:
        home = root / ".prefect"
        os.environ["PREFECT_HOME"] = str(home)
        has_database = any(name.startswith(("PREFECT_SERVER_DATABASE", "PREFECT_API_DATABASE")) for name in os.environ)
        if not has_database and any(sign in str(home) for sign in "%?"):
            # Prefect puts the path into a URL without quoting it, so %20 in a folder's name is read as a space
            os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = sqlite_url(home / "prefect.db", "sqlite+aiosqlite")
    for name, value in _PREFECT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def dvc(root: Path, *arguments: str) -> str:
    """Run a DVC command in `root` and return its output. Raises RepositoryError with DVC's message."""
    output, reason = _dvc(root, arguments)
    if reason is not None:
        raise RepositoryError(f"`dvc {' '.join(arguments)}` failed: {reason}")
    return output


def _dvc(root: Path, arguments: Sequence[str], databases: Path | None = None) -> tuple[str, str | None]:
    """Run a DVC command in `root`; returns its output, and its message if it failed.

    databases: the folder of DVC's databases of files and hashes; None for the one that all commands share.
    """
    environment = stage_environment() | {"PYTHONIOENCODING": "utf-8"}
    if databases is not None:
        environment["DVC_SITE_CACHE_DIR"] = str(databases)
    done = subprocess.run(
        [*DVC, *arguments], cwd=root, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    message = _with_advice(root, (done.stderr.strip() or done.stdout.strip()).removesuffix(_SUPPORT).rstrip())
    return done.stdout, message if done.returncode else None


def _with_advice(root: Path, message: str) -> str:
    lock = from_here(root, "dvc.lock")
    return message + "".join(f"; {advice.format(lock=lock)}" for text, advice in _ADVICE.items() if text in message)


def stage_order(root: Path, output: Path | None = None) -> list[str]:
    """Return the stages in topological order of DVC's graph.

    output: only the stages that this output needs.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    try:
        with _without_warnings(), Repo(str(root)) as repo:
            graph = repo.index.graph.reverse(copy=True)
            if output is not None:
                (out,) = repo.find_outs_by_path(str(output))
                graph = graph.subgraph({out.stage, *networkx.ancestors(graph, out.stage)})
            stages = networkx.topological_sort(graph)
            # names, because DVC's addressing depends on the current folder
            return [str(stage.name) for stage in stages if isinstance(stage, PipelineStage)]
    except DvcException as error:
        raise RepositoryError(f"{root / 'dvc.yaml'}: {_with_advice(root, str(error))}") from error


def missing_inputs(root: Path, stage: str) -> dict[str, str]:
    """Return {input of a stage of dvc.yaml that does not exist: the stage that writes it}."""
    stages: dict[str, Any] = YAML(typ="safe").load(root / "dvc.yaml").get("stages", {})
    writers = {path: name for name, one in stages.items() for path in _paths(one.get("outs", []))}
    inputs = _paths(stages.get(stage, {}).get("deps", []))
    return {path: writers[path] for path in inputs if path in writers and not (root / path).exists()}


def _paths(entries: list[str | dict[str, Any]]) -> list[str]:
    """Return the paths of a list of dvc.yaml, whose entries are paths or {path: options}."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def outputs_without_cache(root: Path, stage: str) -> list[str]:
    """Return the outputs of a stage that has run which DVC's cache should have and does not.

    DVC exits with 0 if it cannot copy a file of an output's folder to its cache, such as onto a full disk.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with _without_warnings(), Repo(str(root)) as repo:
            outs = repo.stage.load_one(str(root / "dvc.yaml"), name=stage).outs
            return [str(out) for out in outs if out.use_cache and out.changed_cache()]
    except DvcException as error:
        raise RepositoryError(f"{root / 'dvc.yaml'}: {_with_advice(root, str(error))}") from error


def changed_stages(root: Path, stages: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return {stage: its changes since dvc.lock was written, in words}; {} if everything is up to date.

    stages: default all. Leave out a running stage, because DVC locks its outputs.
    """
    return _changes(json.loads(dvc(root, "status", "--json", *stages)))


def changed_stages_beside(root: Path, running: str) -> dict[str, list[str]]:
    """Return what `changed_stages` does for all stages but the one that is running.

    DVC is used as a library, because its command takes 0.2 s longer for each stage that it is given.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    status: dict[str, Any] = {}
    try:
        with _without_warnings(), Repo(str(root)) as repo, repo.lock:
            for stage in repo.index.stages:
                if isinstance(stage, PipelineStage) and stage.name != running:
                    status |= {str(stage.name): changes for changes in stage.status(check_updates=True).values()}
    except DvcException as error:
        raise RepositoryError(f"{root / 'dvc.yaml'}: {_with_advice(root, str(error))}") from error
    return _changes(status)


def _changes(status: dict[str, Any]) -> dict[str, list[str]]:
    """Return {stage: changes in words} of DVC's status."""
    return {stage: [word for entry in entries for word in _in_words(entry)] for stage, entries in status.items()}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out the warning of a deprecated attribute of DVC's trie library, which DVC uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "_NoneStep.value", DeprecationWarning)
        yield


def stage_states(root: Path) -> dict[str, list[str]]:
    """Return {stage: its changes since it ran, in words} in topological order; [] means up to date."""
    lock = root / "dvc.lock"
    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(changed_stages, root)  # a process that takes a second, as the rest of this does
        order = stage_order(root)
        changed = changing.result()
        ran = YAML(typ="safe").load(lock)["stages"] if lock.exists() else {}
    return {stage: changed.get(stage, []) if stage in ran else ["has not run yet"] for stage in order}


def _in_words(entry: Any, subject: str = "") -> list[str]:
    """Return DVC's nested status as a flat list, such as `modified artifacts/data`. subject: the path so far."""
    if isinstance(entry, str):
        return [f"{entry} {subject}".strip()]
    return [word for name, value in entry.items() for word in _in_words(value, _inner(subject, name))]


def _inner(subject: str, name: str) -> str:
    """Return the subject without DVC's headings, which add nothing."""
    return subject if name in ("changed deps", "changed outs") else f"{subject} {name}".strip()


@contextmanager
def files_at(root: Path, commit: str, names: list[str]) -> Iterator[Path]:
    """Yield a temporary folder with DVC outputs of `commit`, at their paths relative to `root`.

    They come from DVC's cache, or from its remote with checked hashes. Raises RepositoryError.
    """
    with temporary_folder("peftcore-files-") as folder:
        targets = [folder / name for name in names]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        # each `dvc get` is a process that imports for seconds; DVC as a library does one thing at a time
        with ThreadPoolExecutor(len(names) if (root / ".git").exists() else 1) as pool:
            list(pool.map(partial(get_output, root, commit), names, targets))
        yield folder


def get_output(root: Path, commit: str, name: str, target: Path) -> None:
    """Copy the DVC output `name` of `commit` to `target`, from DVC's cache or remote. Raises RepositoryError."""
    if (root / ".git").exists():
        # with shared databases, one of several commands at once may fail with "database is locked"
        with temporary_folder("peftcore-dvc-") as databases:
            _, reason = _dvc(root, ["get", str(root), name, "--rev", commit, "--out", str(target)], databases)
        if reason is not None:
            raise _unavailable(name, commit, reason)
        return
    # `dvc get` clones the folder that it is given, and this one is not the top of its git repository
    from dvc.exceptions import DvcException
    from dvc.fs import download
    from dvc_data.hashfile.db import ObjectFormatError  # pyright: ignore[reportPrivateImportUsage]
    from dvc_data.index import DataIndexDirError

    try:
        with _without_warnings(), open_repo(root) as repo, repo.switch(commit):
            # in the commit, whose top is /, the repository is another folder than on the disk
            places = [f"{repo.root_dir}/{name}"]
            repo.fetch(targets=places)
            # DVC drops a damaged download from its cache without an error, and `download` would take it again
            for objects in repo.used_objs(targets=places).values():
                for one in objects:
                    repo.cache.local.check(one.value)
            download(repo.dvcfs, name, str(target))
    except FileNotFoundError as error:
        raise _unavailable(name, commit, f"an object of the remote is damaged or absent: {error.filename}") from error
    except (DvcException, DataIndexDirError, ObjectFormatError, OSError) as error:
        raise _unavailable(name, commit, error.__cause__ or error) from error


@contextmanager
def open_repo(root: Path) -> "Iterator[Repo]":
    """Open a DVC repository whose remotes can be reached from every commit.

    DVC takes a relative URL for a path in the commit that it reads, where no remote is.
    """
    from dvc.repo import Repo

    with Repo(str(root)) as opened:
        urls = {name: {"url": str(remote["url"])} for name, remote in opened.config["remote"].items()}
    with Repo(str(root), config={"remote": urls}) as repo:
        yield repo


def _unavailable(name: str, commit: str, reason: object) -> RepositoryError:
    return RepositoryError(
        f"DVC cannot get {name} of {commit[:10]}: {reason}; check the DVC remote, or `dvc push` it from a machine that "
        "has it"
    )
