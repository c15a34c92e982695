"""The command `peftcore` without the packages of the extra `pipeline`: one line, and the command that installs them."""

import re
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
