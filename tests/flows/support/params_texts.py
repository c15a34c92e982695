"""Texts of params.yaml: what is read from one, and what is said of a wrong one."""

from pathlib import Path

import pytest

from flows.errors import ParamsError
from flows.params import Params, load_params


def read(folder: Path, text: str) -> Params:
    path = folder / "params.yaml"
    path.write_text(text)
    return load_params(path)


def refusal(folder: Path, text: str) -> str:
    """The message for a text that has to be refused."""
    with pytest.raises(ParamsError) as refused:
        read(folder, text)
    return str(refused.value)
