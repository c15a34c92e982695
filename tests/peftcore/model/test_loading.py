"""Adapters are added, loaded, exchanged and deleted."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from two_adapters import logits

import peftcore
from peftcore import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    get_peft_model,
)


def test_add_adapter_in_transformers_order_makes_it_active(model: Any) -> None:
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "c")
    assert model.active_adapters() == ["c"]
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert model.active_adapters() == ["default"]
    model.add_adapter("d", LoraConfig(target_modules=["q_proj"]))
    assert model.active_adapters() == ["default"]
    for wrong in (("e",), (LoraConfig(), 3), ("e", "f")):
        with pytest.raises((ConfigError, AdapterNameError), match=r"a name and a configuration|got 3"):
            model.add_adapter(*wrong)


def test_several_are_deleted_or_none(model: Any) -> None:
    with pytest.raises(AdapterNameError, match="nothing"):
        model.delete_adapter(["a", "nothing"])
    assert list(model.peft_config) == ["a", "b"]
    model.delete_adapter(["a", "b"])
    assert list(model.peft_config) == []


def test_load_adapter_exchanges_a_loaded_lora_after_enable_peft_hotswap(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    expected = logits(model)
    model.enable_peft_hotswap(target_rank=8)
    assert set(model.adapter_ranks("a").values()) == {8}
    parameters = {name: p for name, p in model.named_parameters() if ".a." in name}
    for parameter in parameters.values():
        parameter.data.normal_()
    assert not torch.allclose(logits(model), expected)
    model.load_adapter(tmp_path / "a", "a")
    torch.testing.assert_close(logits(model), expected)
    assert all(p is parameters[name] for name, p in model.named_parameters() if ".a." in name)
    for parameter in parameters.values():
        parameter.data.normal_()
    model.load_adapter(tmp_path / "a", "a", hotswap=False)
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(ConfigError, match="is_trainable has no effect on an exchange"):
        model.load_adapter(tmp_path / "a", "a", is_trainable=True)


@pytest.mark.parametrize("library", [peftcore, peft])
def test_loading_into_an_adapter_that_is_loaded_gives_it_the_saved_weights(library: Any, tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), library.LoraConfig(r=2, target_modules=["0"]))

    saved = model()
    for parameter in saved.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    saved.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    for is_trainable in (False, True):
        resumed = model()
        resumed.load_adapter(str(tmp_path), "default", is_trainable=is_trainable)
        torch.testing.assert_close(resumed(x), saved(x))
        assert all(p.requires_grad for p in resumed.parameters()) is False
        assert sum(p.requires_grad for p in resumed.parameters()) == 2, "the loaded adapter trains as before"
        assert resumed.training is is_trainable


def test_weights_of_another_rank_leave_a_loaded_adapter_as_it_was(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(tmp_path)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=3, target_modules=["0"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"lora_A"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ConfigError, match="config has no effect on 'default'"):
        model.load_adapter(tmp_path, "default", config=config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
