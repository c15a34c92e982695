"""LoftQ: the initial adapter corrects the quantisation error."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peftcore import CheckpointError, LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.loftq import replace_lora_weights_loftq

SMOLLM2 = Path(__file__).parents[3] / "artifacts" / "base"


def test_loftq_takes_up_what_quantising_lost(tmp_path: Any) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(64, 64, bias=False))
    made: Any = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(original[0].state_dict())
    model = get_peft_model(nn.Sequential(made.to("cpu")), LoraConfig(r=16, lora_alpha=8, target_modules=["0"]))
    weight, quantised = original[0].weight.detach(), model[0].base.read().clone()
    replace_lora_weights_loftq(model, {"0.weight": weight})
    adapter = adapter_set(model).adapters("default")["0"]
    merged = quantised + adapter.delta_weight()
    u, s, vh = torch.linalg.svd(weight - quantised)
    best = u[:, :16] * s[:16] @ vh[:16]
    torch.testing.assert_close(adapter.delta_weight(), best, rtol=1e-3, atol=1e-4)
    assert (merged - weight).norm() < (quantised - weight).norm()
    kept = adapter.lora_A_weight.detach().clone()
    replace_lora_weights_loftq(model, {"0.weight": weight * 2}, callback=lambda _model, _path: False)
    assert torch.equal(adapter.lora_A_weight, kept)
    with pytest.raises(CheckpointError, match=r"no 0\.weight"):
        replace_lora_weights_loftq(model, {})
    with pytest.raises(CheckpointError, match="no safetensors"):
        replace_lora_weights_loftq(model, tmp_path)
    with pytest.raises(CheckpointError, match="give the original model's as model_path"):
        replace_lora_weights_loftq(model)


def test_the_original_weights_are_found_by_the_name_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    made: Any = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict({"weight": weight})
    model = get_peft_model(nn.Sequential(made.to("cpu")), LoraConfig(r=4, target_modules=["0"]))
    adapter = adapter_set(model).adapters("default")["0"]
    replace_lora_weights_loftq(model, {"0.weight": weight})
    expected = adapter.delta_weight()
    save_file({"0.weight": weight}, tmp_path / "model.safetensors")
    for place in (tmp_path, str(tmp_path / "model.safetensors")):
        adapter.reset_parameters()
        replace_lora_weights_loftq(model, place)
        assert torch.equal(adapter.delta_weight(), expected)
    model.name_or_path = str(tmp_path)
    adapter.reset_parameters()
    replace_lora_weights_loftq(model)
    assert torch.equal(adapter.delta_weight(), expected)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model.name_or_path = "nobody/nothing"
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no directory, and is not in the hub's cache"):
        replace_lora_weights_loftq(model)


def test_keys_of_a_checkpoint_without_the_head() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    made: Any = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict({"weight": weight})
    base: Any = nn.Sequential(nn.Sequential(made.to("cpu")))
    base.base_model_prefix = "0"
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0.0"]))
    replace_lora_weights_loftq(model, {"0.weight": weight})
    assert adapter_set(model).adapters("default")["0.0"].delta_weight().abs().max() > 0


def test_loftq_with_dora_starts_at_the_same_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    made: Any = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict({"weight": weight})
    options = {"r": 16, "lora_alpha": 8, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(made.to("cpu")), LoraConfig(use_dora=True, **options))
    replace_lora_weights_loftq(model, {"0.weight": weight})
    adapter = adapter_set(model).adapters("default")["0"]
    quantised = model[0].base.read()
    torch.testing.assert_close(adapter.merged_weight(quantised), quantised + adapter.delta_weight())


@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="SmolLM2 is not fetched; run `make run` first")
@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_loftq_on_real_layers_is_nearer_to_the_original_than_quantising_alone(storage: str) -> None:
    original = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    for block in (original.model.layers[0], original.model.layers[-1]):
        for layer in (block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.down_proj):
            made: Any = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type=storage)
            made.load_state_dict({"weight": layer.weight})
            model = get_peft_model(nn.Sequential(made.to("cpu")), LoraConfig(r=16, target_modules=["0"]))
            replace_lora_weights_loftq(model, {"0.weight": layer.weight})
            adapter = adapter_set(model).adapters("default")["0"]
            quantised = model[0].base.read()
            lost = (layer.weight - quantised).norm()
            left = (layer.weight - adapter.merged_weight(quantised)).norm()
            assert left < 0.97 * lost
