"""The README tells the truth: its example runs, its tables are the registry's and the project's."""

import re
import tomllib
from pathlib import Path

import pytest

from peftcore.registry import method_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example and len(example.group(1).splitlines()) <= 18
    monkeypatch.chdir(tmp_path)
    exec(compile(example.group(1), "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_the_method_table_is_the_registrys() -> None:
    table = method_table()
    assert table in README, f"put this table into README.md:\n{table}"


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in named:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert re.search(rf"^\| `?{re.escape(name)}`? \|", README, re.MULTILINE), f"{name} has no line in the table"
