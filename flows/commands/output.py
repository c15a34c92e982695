"""Log options of all commands: `--quiet`, `--verbose` and `--log-format`, before a command or after it."""

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
        help="Format of the log on stderr: text, or one JSON object per line.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Warnings, errors and results only, without progress bars.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="More log messages.")]
OPTIONS = {"log_format": (Form, None), "quiet": (Quiet, False), "verbose": (Verbose, False)}
"""{parameter: (annotation, default)}"""


def choose(log_format: LogFormat | None, quiet: bool, verbose: bool) -> None:
    """Set up logging in this process and its child processes."""
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose are opposites; give one of them")
    logs.choose(log_format, quiet, verbose)
    logs.set_up()


def everywhere(app: typer.Typer) -> None:
    """Add the log options to each command of `app` and of its groups."""
    for command in _commands(app):
        assert command.callback is not None
        command.callback = _with_options(command.callback)


def _commands(app: typer.Typer) -> Iterator[Any]:
    yield from app.registered_commands
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from _commands(group.typer_instance)


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return `command` with OPTIONS after its own options; typer reads them from the signature."""

    @functools.wraps(command)
    def with_log_options(**arguments: Any) -> Any:
        choose(**{name: arguments.pop(name) for name in OPTIONS})
        return command(**arguments)

    signature = inspect.signature(command, eval_str=True)
    log_options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in OPTIONS.items()
    ]
    parameters = [*signature.parameters.values(), *log_options]
    with_log_options.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return with_log_options
