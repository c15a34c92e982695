"""The log options: on each command and each group's commands, whatever the command itself takes."""

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from flows.commands import output
from flows.runtime import logs


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging itself stays as the tests have it; the choice is in the environment."""
    monkeypatch.setattr(logs, "set_up", lambda: None)
    for name in (logs.FORMAT, logs.LEVEL):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def app() -> typer.Typer:
    """Commands `say WORD` and `deep say WORD`, which tell the word and how the log was when they ran."""
    app, group = typer.Typer(), typer.Typer()

    def say(word: str, loud: bool = False) -> None:
        """Say a word."""
        print(word.upper() if loud else word, logs.level(), logs.is_json())

    @app.callback()
    def _main() -> None:
        """A group, not a single command."""

    app.command()(say)
    group.command()(say)
    app.add_typer(group, name="deep")
    output.everywhere(app)
    return app


def run(app: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", [["say"], ["deep", "say"]])
@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], "word 20 False"),
        (["--quiet"], "word 30 False"),
        (["--verbose"], "word 10 False"),
        (["--log-format", "json", "--loud"], "WORD 20 True"),
    ],
)
def test_the_options_work_after_any_command(
    app: typer.Typer, command: list[str], options: list[str], shown: str
) -> None:
    assert run(app, *command, "word", *options).stdout.strip() == shown


def test_opposites_are_a_usage_error(app: typer.Typer) -> None:
    refused = run(app, "say", "word", "--quiet", "--verbose")
    assert refused.exit_code == 2 and "opposites" in refused.stderr
    assert run(app, "say", "word", "--log-format", "xml").exit_code == 2


def test_the_format_comes_from_the_environment_too(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT, "json")
    assert run(app, "say", "word").stdout.strip() == "word 20 True"
    assert run(app, "say", "word", "--log-format", "text").stdout.strip() == "word 20 False"


def test_a_later_option_adds_to_an_earlier_one(app: typer.Typer) -> None:
    """`peftcore --quiet stage make --log-format json` is both."""
    output.choose(None, True, False)
    assert run(app, "say", "word", "--log-format", "json").stdout.strip() == "word 30 True"
