"""The command line `peftcore`: which commands there are. What each does stands in `flows.commands`."""

import sys

import typer

from flows.commands import models, pipeline, promotion, registry, review
from flows.stage import set_quiet_environment

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="From data to a promoted adapter: a pipeline of DVC stages, a registry of git tags, a gate between them.",
)


@app.callback()
def _prepare() -> None:
    set_quiet_environment()


for command in (
    pipeline.run,
    pipeline.stage,
    pipeline.status,
    pipeline.plan,
    pipeline.doctor,
    promotion.promote,
    promotion.rollback,
    review.review,
    models.export,
    models.merge,
    models.serve,
):
    app.command()(command)

registry_app = typer.Typer(no_args_is_help=True, help="The registered versions, and which of them has which stage.")
registry_app.command("list")(registry.list_versions)
registry_app.command()(registry.show)
registry_app.command()(registry.diff)
app.add_typer(registry_app, name="registry")


if __name__ == "__main__":
    sys.exit(app())
