"""Files that are written one tensor at a time equal those of safetensors itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcore.export import ExportError
from peftcore.export.safetensors_stream import Header, aligned, mapped_tensors, shards_of, write_index, write_shard

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "wide": torch.randn(2, 2).double(),
    "flag": torch.tensor([True, False, True]),
    "plain": torch.randn(7),
}
HEADERS = {key: Header(tensor.dtype, tuple(tensor.shape)) for key, tensor in TENSORS.items()}


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    ordered = dict(aligned(HEADERS))
    write_shard(tmp_path / "ours", ordered, (TENSORS[key] for key in ordered))
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_hold_what_fits_and_are_read_as_one(tmp_path: Path) -> None:
    shards = shards_of(HEADERS, 40)
    assert list(shards.values()) == [["half"], ["wide", "flag"], ["plain"]]
    for name, keys in shards.items():
        write_shard(tmp_path / name, {key: HEADERS[key] for key in keys}, (TENSORS[key] for key in keys))
        assert load_file(tmp_path / name).keys() == set(keys)
    write_index(tmp_path, shards, HEADERS)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 29, "total_size": 30 + 32 + 3 + 28}
    read = mapped_tensors(tmp_path)
    assert all(torch.equal(read[key], tensor) for key, tensor in TENSORS.items())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ExportError, match="holds no model-00002-of-00003"):
        mapped_tensors(tmp_path)
