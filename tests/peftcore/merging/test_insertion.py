"""A merged adapter is an ordinary LoRA: frozen, not active, and equal after loading, here and in PEFT."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_adapters import SUM, TOKENS, same_everywhere
from torch import nn

from peftcore import LoraConfig, PeftModel
from peftcore.injection.adapter_set import adapter_set


def test_ranks_that_differ_by_layer(llama: Any, with_adapters: Any, tmp_path: Path) -> None:
    a = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5})
    b = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_rslora=True)
    model = with_adapters(llama(), a=a, b=b)
    report = model.add_merged("m", {"a": 0.7, "b": -0.4}, SUM)
    assert sorted(report.ranks.values()) == [2, 2, 3, 3, 5, 8]
    saved = same_everywhere(model, llama(), tmp_path)
    assert saved["r"] in (2, 3) and saved["lora_alpha"] == saved["r"]
    assert sorted(saved["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert saved["rank_pattern"] == saved["alpha_pattern"] and len(saved["rank_pattern"]) == 4


@pytest.mark.parametrize("kind", ["svd", "cat", "linear", "ties"])
def test_what_weighted_makes(kind: str, llama: Any, with_adapters: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", rank_pattern={"layers.1.mlp.down_proj": 4}, lora_dropout=0.1)
    model = with_adapters(llama(), a=config, b=copy.deepcopy(config))
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "m", kind, density=0.5 if kind == "ties" else None)
    saved = same_everywhere(model, llama(), tmp_path)
    assert saved["r"] == saved["lora_alpha"] == {"cat": 4, "svd": 4}.get(kind, 2) and saved["lora_dropout"] == 0.1


def test_frozen_and_not_active_until_it_is_set(linears: Any) -> None:
    model = linears(a={}, b={})
    x = torch.randn(3, 12).double()
    expected = model(x)
    model.set_adapter([])
    model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM)
    assert model.active_adapters == [] and model.peft_config["m"].inference_mode
    model.set_adapter("a")
    assert torch.equal(model(x), expected)
    assert not any(p.requires_grad for a in adapter_set(model).adapters("m").values() for p in a.parameters())
    assert all(p.requires_grad for a in adapter_set(model).adapters("a").values() for p in a.parameters())
    model.set_requires_grad("m", True)
    model.set_adapter("m")
    model(x).sum().backward()
    with pytest.warns(UserWarning, match="'a' is the active one now"):
        model.delete_adapter("m")
    assert list(model.peft_config) == ["a", "b"]


def test_names_that_end_other_names(with_adapters: Any, tmp_path: Path) -> None:
    """ "0" is also the end of "1.0", which is no target, and "1.1" that of "1.1.1", which has another rank."""

    def net() -> Any:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        return nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8)).double()

    a = LoraConfig(r=2, target_modules=r"0|1\.1\.1|2", rank_pattern={r"1\.1\.1": 3})
    model = with_adapters(net(), a=a)
    report = model.add_merged("m", {"a": 1.0}, SUM)
    assert report.ranks == {"0": 2, "1.1.1": 3, "2": 2}
    model.save_pretrained(tmp_path, selected_adapters=["m"])
    loaded = PeftModel.from_pretrained(net(), tmp_path / "m")
    assert set(adapter_set(loaded).adapters("default")) == {"0", "1.1.1", "2"}
    model.set_adapter("m")
    x = torch.randn(3, 8).double()
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_a_model_made_deeper(llama: Any, with_adapters: Any, tmp_path: Path) -> None:
    a = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    model = with_adapters(llama(), a=a, b=LoraConfig(r=2, target_modules=["v_proj"]))
    model.add_merged("m", {"a": 0.7, "b": 0.4}, SUM)
    assert len(adapter_set(model).adapters("m")) == 6
    model.save_pretrained(tmp_path, selected_adapters=["m"])
    model.set_adapter("m")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "m").eval()
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
