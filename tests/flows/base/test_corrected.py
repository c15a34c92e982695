"""The file that names the storage an adapter corrects: written for such starts, kept by training that goes on."""

from pathlib import Path
from typing import Any

import pytest

from flows.base.corrected import corrected_storage, write_corrected_storage
from flows.errors import BaseModelError
from flows.params import Params
from flows.paths import CORRECTED_STORAGE


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a trained adapter, and that of the one before."""
    for name in ("adapter", "before"):
        (tmp_path / name).mkdir()
    return tmp_path / "adapter", tmp_path / "before"


@pytest.mark.parametrize(
    ("values", "storage"),
    [
        ({}, "nf4"),
        ({"method": {"init": "cloq"}, "quantization": {"storage": "int8"}}, "int8"),
        ({"method": {"init": "default"}}, None),
        ({"quantization": {"storage": "none"}}, None),
    ],
)
def test_a_correcting_start_is_named(folders: tuple[Path, Path], values: dict[str, Any], storage: str | None) -> None:
    params = Params.model_validate(values)
    write_corrected_storage(params, *folders)
    found = corrected_storage(folders[0])
    assert (found and found.storage) == storage
    assert found is None or found.compute_dtype == params.quantization.compute_dtype


@pytest.mark.parametrize("text", ["", "[]", '{"storage": "int3"}', "\xff"])
def test_a_damaged_file_is_one_message(folders: tuple[Path, Path], text: str) -> None:
    (folders[0] / CORRECTED_STORAGE).write_text(text, encoding="latin-1")
    with pytest.raises(BaseModelError, match=r"corrected_storage\.json names no storage"):
        corrected_storage(folders[0])


def test_training_that_goes_on_keeps_the_file(folders: tuple[Path, Path]) -> None:
    adapter, before = folders
    write_corrected_storage(Params(), before, adapter)
    write_corrected_storage(Params.model_validate({"train": {"start_from": "v0.1.0"}}), adapter, before)
    assert corrected_storage(adapter) == corrected_storage(before) != None  # noqa: E711 - a chain
