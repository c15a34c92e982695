"""The notebooks run from their first cell to their last one, on a tiny base, and are committed without output."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    content = json.loads(notebook.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_text_and_no_output(notebook: Path) -> None:
    assert cells(notebook, "markdown")[0]["source"][0].startswith("# ")
    for cell in cells(notebook, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tiny_base: Path, shell: Callable[..., str], tmp_path: Path) -> None:
    # a process runs the cells in one namespace, as a kernel does
    code = "\n\n".join("".join(cell["source"]) for cell in cells(notebook, "code"))
    (tmp_path / "cells.py").write_text(code)
    shell(f"{sys.executable} cells.py", tmp_path, PEFTCORE_EXAMPLE_STEPS="2", PEFTCORE_EXAMPLE_BASE=f"path:{tiny_base}")
