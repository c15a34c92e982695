"""`peftcore import`: a project from the configuration file of another training tool."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.common import AsJson, errors
from flows.commands.project import hardware_here, new_folder, print_next_steps

if TYPE_CHECKING:
    from flows.project.translation import Translation


class Source(StrEnum):
    """The tool whose configuration is imported."""

    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"


def import_project(
    source: Annotated[Source, typer.Argument(metavar="TOOL", help="axolotl or llamafactory.")],
    file: Annotated[Path, typer.Argument(dir_okay=False, exists=True, help="The tool's configuration file.")],
    folder: Annotated[Path, typer.Argument(file_okay=False, help="The project's folder.")] = Path(),
    data: Annotated[str | None, typer.Option(help="The training data, in place of the file's.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, in place of the file's.")] = None,
    hardware: Annotated[str | None, typer.Option(help="cpu or gpu; default: what this machine has.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the registry; default: the folder's name.")] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Leave out a key that changes the training and has no counterpart."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a project from a configuration of Axolotl or LLaMA-Factory, and list what became of each of its keys.

    Keys that change the training and have no counterpart are an error that names them all; --leave-out KEY goes on
    without one.
    """
    with errors():
        from flows.errors import ParamsError
        from flows.project import axolotl, llama_factory
        from flows.project.create import NewProject, create_project, name_from
        from flows.project.presets import HARDWARE
        from flows.project.translation import BASE, DATA, TASK, check_missing, translate

        hardware = hardware or hardware_here()
        if hardware not in HARDWARE:
            raise ParamsError(f"--hardware must be one of {', '.join(HARDWARE)}; got {hardware!r}")
        tool = {Source.AXOLOTL: axolotl.TOOL, Source.LLAMAFACTORY: llama_factory.TOOL}[source]
        given = {key: value for key, value in ((BASE, base), (DATA, data)) if value}
        translation = translate(tool, file, given)
        check_missing(tool, file, translation, leave_out or ())
        chosen = {TASK: "chat", **translation.project, **given}
        for key, option in ((BASE, "--base MODEL"), (DATA, "--data FILE")):
            if key not in chosen:
                raise ParamsError(f"{file} names no {key}; give {option}")
        root = folder.expanduser().resolve()
        project = NewProject(
            name or name_from(root), chosen[DATA], chosen[BASE], chosen[TASK], hardware, translation.values  # type: ignore[arg-type]
        )  # fmt: skip
        with new_folder(root):
            written = create_project(root, project, force)
        if as_json:
            table = {
                "values": translation.values,
                "keys": translation.keys,
                "differs": translation.notes,
                "without_effect": translation.without_effect,
                "left_out": translation.missing,
            }
            print(json.dumps({"folder": str(root), "name": project.name, "files": written, **table}))
            return
        _print(translation)
        print(f"\n{project.name}: wrote {', '.join(written)}")
        print_next_steps(root)


def _print(translation: "Translation") -> None:
    """Print what became of each key."""
    for key, parameters in translation.keys.items():
        values = (f"{name}: {translation.values[name]}" for name in parameters if name in translation.values)
        named = ", ".join(values) or "read"
        print(f"{key}  ->  {named}")
    for title, keys in (
        ("differs from the other tool:", translation.notes),
        ("left out, without effect on the trained weights:", translation.without_effect),
        ("left out, although it changes the training:", translation.missing),
    ):
        if keys:
            print(f"\n{title}")
        for key, text in keys.items():
            print(f"  {key}: {text}")
