"""The command line in this process."""

from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app


def peftcore(*arguments: str, **environment: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"} | environment).invoke(app, list(arguments))
