"""What may be in an adapter folder, and weights that are no numbers, in every type they are stored in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flows.paths import CORRECTED_STORAGE
from flows.registry.adapter_files import foreign_files, non_finite_tensors

WITH_INFINITY = ["float64", "float32", "float16", "bfloat16", "float8_e5m2"]
BAD = [(dtype, value) for dtype in WITH_INFINITY for value in ("nan", "inf", "-inf")] + [("float8_e4m3fn", "nan")]


def test_only_known_files_belong_there(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "SHA256SUMS", CORRECTED_STORAGE):
        (tmp_path / name).touch()
    assert foreign_files(tmp_path) == []
    (tmp_path / "adapter_model.bin").touch()
    (tmp_path / "code").mkdir()
    (tmp_path / "training_args.pkl").touch()
    assert foreign_files(tmp_path) == ["adapter_model.bin", "code", "training_args.pkl"]


def test_a_link_does_not_belong_there_even_under_a_good_name(tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    assert foreign_files(folder) == ["README.md"]


def test_no_folder_is_foreign(tmp_path: Path) -> None:
    assert foreign_files(tmp_path / "none")


@pytest.mark.parametrize(("dtype", "value"), BAD)
def test_every_kind_of_number_that_is_none_is_found(tmp_path: Path, dtype: str, value: str) -> None:
    bad = torch.ones(8)
    bad[5] = float(value)
    good = torch.tensor([0.0, -0.0, 1.0, -448.0, 0.002])
    tensors = {"good": good.to(getattr(torch, dtype)), "bad": bad.to(getattr(torch, dtype))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert non_finite_tensors(tmp_path) == (["bad"], 2)


def test_masks_and_counts_are_numbers(tmp_path: Path) -> None:
    save_file({"mask": torch.tensor([True]), "rank": torch.tensor([3])}, tmp_path / "adapter_model.safetensors")
    assert non_finite_tensors(tmp_path) == ([], 2)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    (bad,), count = non_finite_tensors(tmp_path)
    assert bad.startswith("adapter_model.safetensors (not readable:")
    assert count == 0
