"""Shared code of the commands: options, the project of the current folder, errors as exit codes."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.errors import BaseModelError, ParamsError, PipelineError, RegistryError
from flows.paths import Paths
from flows.runtime.project import find_root
from flows.runtime.stage import fail, refused_by_system
from flows.runtime.temporary import temporary_folder
from peftcore.errors import PeftError

if TYPE_CHECKING:
    from flows.params import Params, Quantization
    from flows.registry.reader import RegistryReader
    from flows.runtime.git import Git

logger = logging.getLogger(__name__)

SIX_HOURS = 6 * 3600.0
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
StageTimeout = Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Time limit for each stage.")]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="REMOTE",
        help="Also push the tags to this git remote, which decides between clones: if another writer was faster, "
        "nothing changes here and the exit code is 4.",
    ),
]

AdapterFolder = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="The adapter's folder; default: the pipeline's adapter."),
]
BaseFolder = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="The base model's folder; default: the pipeline's base."),
]


def writable(file: Path | None) -> Path | None:
    """Return the file that an option names. A file that cannot be written is typer's usage error, before any work."""
    if file is None:
        return None
    folder = next(one for one in file.absolute().parents if os.access(one, os.F_OK))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise typer.BadParameter(f"{file} cannot be written, because {folder} is no folder that you can write to")
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a folder; give a file")
    return file


def adapter_and_base(adapter: Path | None, base: Path | None) -> tuple[Path, Path]:
    """Return the adapter's and the base's folder; a folder that is None is replaced by the pipeline's.

    Raises:
        BaseModelError: The adapter was trained on another calibrated base, or the base has not been fetched.
    """
    from flows.base.calibrated import calibrated_identity, check_adapter

    if adapter is None or base is None:
        paths = Paths(find_root())
        adapter, base = adapter or paths.adapter, base or pipeline_base(paths)
    check_adapter(adapter, calibrated_identity(base))
    return adapter, base


def pipeline_base(paths: Paths) -> Path:
    """Return the folder of the pipeline's calibrated base, or of its base as fetched if there is none.

    Raises:
        BaseModelError: The base has not been fetched.
    """
    return paths.calibrated if is_calibrated(paths.calibrated) else fetched_base(paths)


def fetched_base(paths: Paths) -> Path:
    """Return the folder of the pipeline's base as fetched. Raises BaseModelError if it has not been fetched."""
    if not paths.base.is_dir():
        raise BaseModelError(f"there is no {paths.base}; run `peftcore stage fetch`")
    return paths.base


def is_calibrated(base: Path) -> bool:
    """Return True if a folder holds a calibrated base."""
    from flows.base.calibrated import calibration_record

    return calibration_record(base) is not None


@contextmanager
def plain_base(base: Path, corrected: "Quantization | None" = None) -> Iterator[Path]:
    """Give a base's folder, or a temporary folder with the dequantised weights that the adapter was trained on.

    Args:
        base: The base's folder.
        corrected: The storage that the adapter corrects, if any. Without it, and without calibration, the base's own
            folder is given.
    """
    calibrated = is_calibrated(base)
    if corrected is None and not calibrated:
        yield base
        return
    from flows.base.folder import load_tokenizer
    from flows.base.model import load_calibrated, load_dequantized

    with temporary_folder("peftcore-base-") as folder:
        model = load_dequantized(base, corrected) if corrected and not calibrated else load_calibrated(base)
        model.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
        yield folder


@contextmanager
def errors() -> Iterator[None]:
    """Turn expected errors, a full disk, a missing permission and Ctrl-C into one message and an exit code.

    A bug keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; run the command again to continue", status=130)
    except PipelineError as error:
        fail(str(error), error.status)
    except PeftError as error:
        fail(str(error))
    except Exception as error:
        if message := refused_by_system(error):
            fail(message)
        raise


@contextmanager
def one_document(as_json: bool) -> Iterator[None]:
    """With `as_json`, redirect everything that is printed inside to stderr, so stdout has one document only."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


@contextmanager
def project() -> Iterator[tuple["Params", Paths]]:
    """Give parameters and paths of the current folder's pipeline.

    Raises:
        ParamsError: params.yaml cannot be used; keys of another version of peftcore are named as such.
    """
    from flows.params import load_params

    root = find_root()
    try:
        params = load_params(Paths(root).params)
    except ParamsError as error:
        from flows.project.outdated import differences

        raise ParamsError("\n".join([str(error), *differences(root)])) from error
    yield params, Paths(root)


def warn_of_other_version(root: Path) -> None:
    """Warn of what differs between a project's files and the installed version."""
    from flows.project.outdated import differences

    for one in differences(root):
        logger.warning("%s", one)


def warn_of_uncommitted(git: "Git", words: str, paths: Sequence[str] | None = None) -> None:
    """Warn of uncommitted files, with the git command that commits them.

    Args:
        git: the repository.
        words: What the command does about them; the files follow.
        paths: files and folders to look at; by default those of parameters, data and code.
    """
    from flows.runtime.inputs import INPUTS, unused_changes

    if unused := unused_changes(git, INPUTS if paths is None else paths):
        logger.warning("%s: %s", words, unused)


def holders(params: "Params", paths: Paths) -> dict[str, str | None]:
    """Return {stage: version that holds it}."""
    from flows.registry.project_registry import registry_of

    stages = registry_of(params, paths.root).stages()
    return {stage: holder.version for stage, holder in stages.items()}


def at_stage(params: "Params", stage: str | None) -> "Params":
    """Return the parameters with another `gate.stage`. An invalid name is typer's usage error, exit code 2."""
    from pydantic import ValidationError

    from flows.params import Gate

    if stage is None:
        return params
    try:
        gate = Gate.model_validate(params.gate.model_dump() | {"stage": stage})
    except ValidationError as error:
        raise typer.BadParameter(
            f"{stage!r} is not a valid stage name; use lower-case letters, digits and dashes", param_hint="--stage"
        ) from error
    return params.model_copy(update={"gate": gate})


def newest(registry: "RegistryReader") -> str:
    """Return the newest version's number. Raises RegistryError if there is no version."""
    versions = registry.versions()
    if not versions:
        raise RegistryError(f"no version of {registry.name} yet; use `peftcore run`")
    return versions[-1].number
