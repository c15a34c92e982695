"""The page of the command line, from the commands themselves."""

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import typer.main

from flows.cli import app


def command_line() -> Any:
    """Return the click command of `peftcore`."""
    command = typer.main.get_command(app)
    command.name = "peftcore"
    return command


def commands_page() -> str:
    """Return the Markdown of the page."""
    group = command_line()
    context = group.make_context("peftcore", [], resilient_parsing=True)
    parts = [
        "# Commands\n",
        f"{group.help}\n",
        f"{group.epilog}\n",
        "These options may stand before or after a command:\n",
    ]
    parts += [_parameters(group, context)]
    common = {parameter.name for parameter in group.get_params(context)}
    for path, command, own in _all(group, context):
        parts += [f"## {path}\n", f"```text\n{command.get_usage(own).removeprefix('Usage: ')}\n```\n"]
        parts += [f"{inspect.cleandoc(command.help or '')}\n", _parameters(command, own, common)]
    return "\n".join(parts)


def _all(group: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (full name, command, context) of each command, those of sub-groups included."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        own = command.make_context(name, [], parent=context, resilient_parsing=True)
        if command.hidden:
            continue
        if hasattr(command, "list_commands"):
            yield from _all(command, own)
        else:
            yield own.command_path, command, own


def _parameters(command: Any, context: Any, common: Collection[str] = ()) -> str:
    """Return a table of a command's arguments and options, without those of every command."""
    parameters = [one for one in command.get_params(context) if one.name not in common]
    records = [parameter.get_help_record(context) for parameter in parameters]
    rows = [f"| `{_cell(name)}` | {_cell(text)} |" for name, text in filter(None, records)]
    return "\n".join(["| argument or option | meaning |", "|---|---|", *rows, ""]) if rows else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "&#124;" if "`" in text else "/")
