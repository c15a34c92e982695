"""The command `peftcore` without the packages of the extra `pipeline`: one line, and the command that installs them."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from flows import __main__ as command

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_modules_are_those_of_the_extra() -> None:
    extras = ("export", "pipeline", "quant", "serve", "train")
    wanted = {normal(re.split(r"[<>=\[]", one)[0]) for extra in extras for one in EXTRAS[extra]} - {"peftcore"}
    distributions = packages_distributions()
    checked = {normal(name) for module in command.MODULES for name in distributions[module]}
    assert wanted <= checked
    assert all(wanted & {normal(name) for name in distributions[module]} for module in command.MODULES)


def test_one_line_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda name: None if name in ("dvc", "typer") else object())
    with pytest.raises(SystemExit) as refusal:
        command.main()
    assert refusal.value.code == (
        "error: the command `peftcore` needs dvc, typer; install with: pip install 'peftcore[pipeline]'"
    )


TEXT = "import sys; from flows.__main__ import prepare_streams; prepare_streams(); from rich.console import Console; "


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"PYTHONIOENCODING": "latin-1"}, b"\\u2713\n"), ({"COLUMNS": "0"}, "\u2713\n".encode())],
)
def test_marks_are_printed_in_every_encoding_and_without_a_width(variables: dict[str, str], expected: bytes) -> None:
    command = [sys.executable, "-c", TEXT + "Console().print(chr(0x2713))"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"} | variables
    assert subprocess.run(command, env=environment, capture_output=True, check=True).stdout == expected


def test_closed_streams_keep_their_descriptors() -> None:
    code = TEXT + "print(open(sys.executable).fileno() > 2, file=sys.stderr); print(1)"
    for closed in (">&-", "<&- >&-", ">&- 2>&-"):
        subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], check=True)


def test_a_reader_that_closes_stdout_ends_the_command_as_other_programs() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "flows", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (command.CLOSED_PIPE, b"")


def test_names_of_files_are_utf_8_in_every_locale() -> None:
    code = "from flows.__main__ import use_utf_8; use_utf_8(); import sys; "
    code += "print(sys.getfilesystemencoding(), sys.stdout.encoding, ascii(sys.argv[1]))"
    other = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for streams in ("latin-1", "utf-8"):
        environment = other | {"PYTHONIOENCODING": streams}
        done = subprocess.run([sys.executable, "-c", code, "Käse"], env=environment, capture_output=True, check=True)
        assert done.stdout.decode() == f"utf-8 {streams} 'K\\xe4se'\n".replace("latin-1", "iso8859-1")
