"""The command line `peftcore`. The commands are in `flows.commands`."""

import signal
import sys
from typing import Annotated

import typer

from flows.commands import (
    chatting,
    ci,
    feedback,
    importing,
    limits,
    models,
    output,
    pipeline,
    project,
    promotion,
    publishing,
    registry,
    retraining,
    review,
    sweep,
    webhooks,
)
from flows.runtime.stage import exit_on_signal, set_quiet_environment
from flows.runtime.stage_code import installed_version

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="From data to a promoted adapter: a pipeline of DVC stages, a promotion gate, and a registry of git tags.",
    epilog="Exit codes: 0 success; 1 failed or refused, with one message on stderr that begins with `error:`; 2 usage "
    "error; 3 the gate refuses; 4 conflict or busy, another writer was faster or is at work, run the command again; "
    "130 Ctrl-C; 141 the reader of stdout closed it; 143 SIGTERM. Results go to stdout (`--json`: one document), "
    "everything else to stderr.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(installed_version() or "source")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the installed version and exit; `source` for a clone, whose code may change.",
    ),
]


@app.callback()
def _prepare(
    log_format: output.Form = None,
    quiet: output.Quiet = False,
    verbose: output.Verbose = False,
    version: Version = False,
) -> None:
    set_quiet_environment()
    output.choose(log_format, quiet, verbose)
    signal.signal(signal.SIGTERM, exit_on_signal)


for command in (
    project.init,
    project.upgrade,
    pipeline.run,
    pipeline.stage,
    pipeline.status,
    pipeline.plan,
    pipeline.doctor,
    promotion.promote,
    promotion.rollback,
    promotion.approve,
    limits.limits,
    registry.reproduce,
    feedback.feedback,
    retraining.retrain,
    retraining.schedule,
    sweep.sweep,
    ci.ci,
    review.review,
    review.trial,
    models.export,
    models.merge,
    models.serve,
    chatting.chat,
    publishing.push,
):
    app.command()(command)

registry_app = typer.Typer(no_args_is_help=True, help="Registered versions and their stages.")
registry_app.command("list")(registry.list_versions)
registry_app.command()(registry.show)
registry_app.command()(registry.diff)
registry_app.command()(registry.card)
registry_app.command()(registry.fetch)
registry_app.command()(registry.gc)
app.add_typer(registry_app, name="registry")

webhooks_app = typer.Typer(no_args_is_help=True, help="Webhooks in the outbox.")
webhooks_app.command("list")(webhooks.list_waiting)
webhooks_app.command()(webhooks.send)
webhooks_app.command()(webhooks.discard)
app.add_typer(webhooks_app, name="webhooks")

app.command("import")(importing.import_project)
output.everywhere(app)


if __name__ == "__main__":
    sys.exit(app())
