"""Shell completion, by the protocol that the shell speaks: what this pipeline has, and at once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.commands import completion


def complete(root: Path, words: str, before: str = "") -> list[str]:
    environment = {
        "_PEFTCORE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    code = before + "from flows.cli import app; app(prog_name='peftcore')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def released(project: Any) -> Path:
    for tag in ("docstrings@v0.1.0", "docstrings@v0.2.0", "docstrings@v0.3.0", "docstrings@v0.3.0!", "other@v9.0.0"):
        project.git("tag", "--annotate", "--message=x", tag)
    project.git("tag", "--annotate", "--message=x", "docstrings#champion#1")
    return project.root


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("peftcore stage ", {"make", "register"}),
        ("peftcore stage re", {"register"}),
        ("peftcore promote --version v0.2", {"v0.2.0"}),
        ("peftcore registry show ", {"champion", "v0.1.0", "v0.2.0"}),
        ("peftcore regis", {"registry"}),
    ],
)
def test_what_there_is_is_completed(released: Path, words: str, found: set[str]) -> None:
    assert set(complete(released / "source", words)) == found


def test_outside_of_a_pipeline_nothing_is_completed_and_nothing_breaks(tmp_path: Path) -> None:
    assert complete(tmp_path, "peftcore stage ") == []


def test_keys_of_parameters_and_metrics(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(released)
    assert completion.params("reg") == ["register.remote="]
    assert completion.metrics("") == []
    (released / "metrics.json").write_text('{"adapter": {"loss": 2.7}, "objective": "sft"}')
    assert completion.metrics("ad") == ["adapter.loss"]
    (released / "params.yaml").write_text("a: [")
    assert completion.params("") == []


def test_files_of_another_form_break_nothing(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(released)
    (released / "metrics.json").write_text("[1]")
    assert completion.metrics("") == []
    (released / "params.yaml").write_text("project: mail\n")
    assert completion.params("") == ["project="] and "v0.1.0" in completion.versions("")
    for text in (b"- project\n", b"project: {name: \xff}\n"):
        (released / "params.yaml").write_bytes(text)
        assert completion.params("") == []
    (released / "dvc.yaml").write_text("stages: {1: {cmd: x}}\n")
    assert completion.stages("") == ["1"]


def test_it_loads_nothing_heavy(released: Path) -> None:
    """Neither the commands nor an answer needs a library that takes long to load."""
    loaded = released / "modules.txt"
    save_modules = (
        f"import atexit, sys; atexit.register(lambda: open({str(loaded)!r}, 'w').write(' '.join(sys.modules)));"
    )
    assert complete(released, "peftcore stage m", before=save_modules) == ["make"]
    modules = set(loaded.read_text().split())
    assert "flows.commands.completion" in modules
    assert modules.isdisjoint({"torch", "transformers", "dvc", "prefect", "numpy", "pyarrow"})
