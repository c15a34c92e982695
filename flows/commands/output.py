"""How commands tell what they do: `--quiet`, `--verbose` and `--log-format`, before a command or after it."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from flows.runtime import logs
from flows.runtime.logs import LogFormat

Form = Annotated[
    LogFormat | None,
    typer.Option(
        "--log-format",
        envvar=logs.FORMAT,
        show_envvar=True,
        help="Of the log, on stderr: text, or one JSON object a line.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Warnings, errors and results only: no bars, no word of DVC's.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="More of what is done.")]
OPTIONS = {"log_format": (Form, None), "quiet": (Quiet, False), "verbose": (Verbose, False)}
"""{parameter: (annotation, default)}"""


def choose(log_format: LogFormat | None, quiet: bool, verbose: bool) -> None:
    """Log as chosen, in this process and those below it."""
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose are opposites; give one of them")
    logs.choose(log_format, quiet, verbose)
    logs.set_up()


def everywhere(app: typer.Typer) -> None:
    """Let each command of `app`, and of those below it, take the options that `app` itself takes before a command."""
    for command in _commands(app):
        assert command.callback is not None
        command.callback = _with_options(command.callback)


def _commands(app: typer.Typer) -> Iterator[Any]:
    yield from app.registered_commands
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from _commands(group.typer_instance)


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` with OPTIONS after its own; typer reads them from the signature."""

    @functools.wraps(command)
    def told(**arguments: Any) -> Any:
        choose(**{name: arguments.pop(name) for name in OPTIONS})
        return command(**arguments)

    signature = inspect.signature(command, eval_str=True)
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in OPTIONS.items()
    ]
    told.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *ours])  # pyright: ignore[reportAttributeAccessIssue]
    return told
