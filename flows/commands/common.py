"""What the commands share: options, the project that the current folder belongs to, errors as exit statuses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.errors import PipelineError, RegistryError
from flows.paths import Paths
from flows.runtime.project import find_root
from flows.runtime.stage import fail, is_disk_full
from peftcore.errors import PeftError

if TYPE_CHECKING:
    from flows.params import Params
    from flows.registry.registry import Registry

SIX_HOURS = 6 * 3600.0
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
StageTimeout = Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Stop a stage that takes longer.")]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="REMOTE",
        help="Also push the tags to this git remote, which then decides between several clones: if somebody else "
        "promoted first, nothing is promoted here.",
    ),
]

AdapterFolder = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="The adapter's directory; the pipeline's own if left out."),
]
BaseFolder = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="The base model's folder; the pipeline's own if left out."),
]


def adapter_and_base(adapter: Path | None, base: Path | None) -> tuple[Path, Path]:
    """As given, or those of the pipeline that the current folder belongs to."""
    if adapter is not None and base is not None:
        return adapter, base
    paths = Paths(find_root())
    return adapter or paths.adapter, base or paths.base


@contextmanager
def errors() -> Iterator[None]:
    """Turn what is refused into one message and an exit status; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; run it again to go on", status=130)
    except PipelineError as error:
        fail(str(error), error.status)
    except PeftError as error:
        fail(str(error))
    except OSError as error:
        if not is_disk_full(error):
            raise
        fail(f"the disk is full ({error}); free some space and run it again, what was there before is intact")


@contextmanager
def one_document(as_json: bool) -> Iterator[None]:
    """Where JSON was asked for, let what others print inside go to stderr, so that stdout has the document alone."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


@contextmanager
def project() -> Iterator[tuple["Params", Paths]]:
    """Parameters and paths of the pipeline that the current folder belongs to."""
    from flows.params import load_params

    root = find_root()
    yield load_params(Paths(root).params), Paths(root)


def holders(params: "Params", paths: Paths) -> dict[str, str | None]:
    from flows.registry.project_registry import registry_of

    stages = registry_of(params, paths.root).stages()
    return {stage: holder.version for stage, holder in stages.items()}


def at_stage(params: "Params", stage: str | None) -> "Params":
    """The parameters with another stage to promote to; typer's error, with exit status 2, for an impossible name."""
    from pydantic import ValidationError

    from flows.params import Gate

    if stage is None:
        return params
    try:
        gate = Gate.model_validate(params.gate.model_dump() | {"stage": stage})
    except ValidationError as error:
        raise typer.BadParameter(
            f"{stage!r} is no name of a stage; give lower-case letters, digits and dashes", param_hint="--stage"
        ) from error
    return params.model_copy(update={"gate": gate})


def newest(registry: "Registry") -> str:
    versions = registry.versions()
    if not versions:
        raise RegistryError(f"no version of {registry.name} yet; use `peftcore run`")
    return versions[-1].number
