"""Tensors are read where they lie in the file's bytes, and whatever is unusual goes to the library, which judges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from peftcore import LoraConfig, get_peft_model
from peftcore.errors import CheckpointError
from peftcore.files.tensors import WEIGHTS_NAME, _views, parsed, read_tensors

TENSORS = {
    "b.wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "a.half": torch.arange(4, dtype=torch.float16),
    "c.brain": torch.arange(8, dtype=torch.bfloat16).view(2, 2, 2),
    "d.one": torch.tensor(3.5),
    "e.count": torch.tensor([1, 2, 3]),
    "f.empty": torch.zeros(0, 3),
}


def file_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: Any, end: Any, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def test_all_types_and_shapes_are_read_in_place() -> None:
    content = bytearray(save(TENSORS, metadata={"format": "pt"}))
    views = _views(memoryview(content))
    assert views is not None and views.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(views[name], tensor) and views[name].dtype == tensor.dtype
    content[-1] ^= 1
    assert not all(torch.equal(views[name], tensor) for name, tensor in TENSORS.items())  # the same memory


@pytest.mark.parametrize(
    "tensors",
    [{}, {"odd": torch.ones(3, dtype=torch.uint8)}, {"odd": torch.ones(3, dtype=torch.bool), "one": torch.ones(1)}],
    ids=["none", "another type", "another type beside"],
)
def test_what_is_rare_goes_through_the_library(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    content = bytearray(save(tensors))
    assert _views(memoryview(content)) is None
    found = parsed(memoryview(content), tmp_path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": file_of(b"{nonsense", b""),
    "a list": file_of([], b""),
    "deep": file_of(b"[" * 100_000, b""),
    "overlapping": file_of({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"),
    "a hole": file_of({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12),
    "past the end": file_of({"a": entry(0, 400, (100,))}, b"1234"),
    "more than is named": file_of({"a": entry(0, 4)}, b"12345678"),
    "backwards": file_of({"a": entry(4, 0)}, b"1234"),
    "below zero": file_of({"a": entry(-4, 0)}, b"1234"),
    "fractions": file_of({"a": entry(0.0, 4.0)}, b"1234"),
    "words": file_of({"a": entry("0", "4")}, b"1234"),
    "a shape that is another size": file_of({"a": entry(0, 4, (2,))}, b"1234"),
    "two sizes below zero": file_of({"a": entry(0, 4, (-1, -1))}, b"1234"),
    "a shape that is a word": file_of({"a": entry(0, 4, "4")}, b"1234"),
    "three offsets": file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
    "no such type": file_of({"a": entry(0, 4, (1,), "F33")}, b"1234"),
    "a type that is a list": file_of({"a": entry(0, 4, (1,), ["F32"])}, b"1234"),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "a number for a tensor": file_of({"a": 4}, b"1234"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_an_error_of_ours(case: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        parsed(memoryview(bytearray(HOSTILE[case])), tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_tensors(tmp_path)


def _rewrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("change", [_rewrite, Path.unlink], ids=["overwritten", "gone"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_does_not_look_at_its_file_again(
    change: Callable[[Path], None], trainable: bool, tmp_path: Path
) -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2))
    torch.nn.init.ones_(model[0].adapters["default"].lora_B_weight)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again", is_trainable=trainable)
    if trainable:
        model.set_adapter("again")
    change(tmp_path / WEIGHTS_NAME)
    first, again = (model[0].adapters[name] for name in ("default", "again"))
    assert torch.equal(first.lora_A_weight, again.lora_A_weight) and torch.equal(
        first.lora_B_weight, again.lora_B_weight
    )
    assert all(p.requires_grad == trainable and p.is_leaf for p in again.parameters())
    with torch.no_grad():
        again.lora_A_weight.zero_()
    assert first.lora_A_weight.any() and again.lora_B_weight.all()


def test_a_flipped_bit_is_found_before_anything_is_put_into_the_model(tmp_path: Path) -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    whole = path.read_bytes()
    for place in (-1, 12):  # in the numbers, and in the header
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="SHA256SUMS"):
            model.load_adapter(tmp_path, "again")
        assert list(model.peft_config) == ["default"]
    save_file({"wrong": torch.ones(1)}, path)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        model.load_adapter(tmp_path, "again")
