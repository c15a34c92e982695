"""Adapter directories that are damaged, foreign or not whole, and names that would corrupt them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftcore import AdapterNameError, CheckpointError, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model


def net(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "1"])).save_pretrained(tmp_path)
    return tmp_path


def refused(directory: Path, message: str, model: nn.Module | None = None) -> None:
    model = model or net()
    modules = dict(model.named_modules())
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(model, directory)
    assert dict(model.named_modules()) == modules


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_truncated_file(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    refused(saved, "SHA256SUMS")
    (saved / "SHA256SUMS").unlink()
    refused(saved, "damaged or truncated")


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_flipped_bit(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(saved, r"adapter_model\.safetensors is not what SHA256SUMS says")


@pytest.mark.faults("pickle or foreign files")
@pytest.mark.parametrize("name", ["adapter_model.bin", "extra.pkl"])
def test_a_pickle_is_refused_before_anything_is_read(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(saved, f"{name}.*can run code")


def test_another_base(saved: Path) -> None:
    refused(saved, r"another base model: .*lora_A.weight is \[2, 6\], here \[2, 9\]", net(9))


def test_missing_and_unexpected_keys_are_named(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.7.lora_A.weight"] = tensors.pop("base_model.model.0.lora_A.weight")
    save_file(tensors, weights)
    (saved / "SHA256SUMS").unlink()
    refused(saved, r"missing base_model\.model\.0\.lora_A\.weight.*unexpected base_model\.model\.7")


def test_absent_directory_and_absent_weights(tmp_path: Path, saved: Path) -> None:
    refused(tmp_path / "nowhere", "no adapter_config")
    (saved / "adapter_model.safetensors").unlink()
    refused(saved, "not saved whole")


@pytest.mark.parametrize("step", ["save_file", "manifest_text", "flush_to_disk"])
def test_a_failed_save_leaves_the_old_adapter_whole(step: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    before = {f.name: f.read_bytes() for f in saved.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"peftcore.checkpoint.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


@pytest.mark.parametrize("name", ["layers", "0", "keys", "type", "lora_A", "o"])
def test_any_word_is_a_name(name: str, tmp_path: Path) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), adapter_name=name)
    model.add_adapter("another", LoraConfig(r=3, target_modules=["1"]))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / name / "adapter_model.safetensors").keys()
    assert sorted(keys) == ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"]
    loaded = PeftModel.from_pretrained(net(), tmp_path / name, adapter_name=name)
    x = torch.randn(2, 6)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["a.b", "", "../up", "a/b"])
def test_names_that_cannot_be_paths(name: str) -> None:
    with pytest.raises(AdapterNameError, match="word without"):
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), net(), name)


def test_disk_format(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["inference_mode"] is True and config["peft_type"] == "LORA"
    assert {f.name for f in saved.iterdir()} == {
        "README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


def test_base_weights_of_a_targeted_embedding_are_accepted(tmp_path: Path) -> None:
    """PEFT writes the base's embedding beside its adapter."""
    model = nn.Sequential(nn.Embedding(9, 6))
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.0.base_layer.weight": torch.zeros(9, 6)}, weights)
    (tmp_path / "SHA256SUMS").unlink()
    PeftModel.from_pretrained(nn.Sequential(nn.Embedding(9, 6)), tmp_path)
