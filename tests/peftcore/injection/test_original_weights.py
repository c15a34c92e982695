"""Original weights are found in mappings, files and directories of several files, and checked before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peftcore import CheckpointError
from peftcore.errors import SizeMismatchError
from peftcore.injection.original_weights import OriginalWeights

SHAPES = {"a.0": (2, 3), "a.1": (4, 5)}


def test_weights_are_read_from_every_source(tmp_path: Path) -> None:
    weights = {f"{path}.weight": torch.randn(shape) for path, shape in SHAPES.items()}
    save_file({"a.0.weight": weights["a.0.weight"]}, tmp_path / "model-1.safetensors")
    save_file({"a.1.weight": weights["a.1.weight"]}, tmp_path / "model-2.safetensors")
    model: Any = nn.Sequential()
    model.name_or_path = str(tmp_path)
    without_head = {name.removeprefix("a."): weight for name, weight in weights.items()}
    model.base_model_prefix = "a"
    for source in (weights, without_head, tmp_path, str(tmp_path), None):
        original = OriginalWeights(model, source, SHAPES)
        assert all(torch.equal(original.read(path), weights[f"{path}.weight"]) for path in SHAPES)
    one_file = OriginalWeights(model, tmp_path / "model-1.safetensors", {"a.0": (2, 3)})
    assert torch.equal(one_file.read("a.0"), weights["a.0.weight"])
    with pytest.raises(CheckpointError, match=r"no a\.1\.weight in the original weights"):
        OriginalWeights(model, tmp_path / "model-1.safetensors", SHAPES)
    with pytest.raises(SizeMismatchError, match=r"a\.1\.weight of the original weights is \(4, 5\), .* is \(5, 4\)"):
        OriginalWeights(model, tmp_path, SHAPES | {"a.1": (5, 4)})
