"""A directory for vLLM keeps their rules and computes the same as the adapter."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm_models import adapted, llama

from peftcore import LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peftcore.conversion import add_as_lora
from peftcore.export import ExportError, check_vllm, export_vllm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft


TOKENS = torch.arange(1, 25).view(2, 12)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize(
    "options", [{}, {"r": 20}, {"layers_to_transform": [1]}, {"init_lora_weights": "pissa"}, {"use_rslora": False}]
)
def test_it_keeps_the_rules_and_the_function(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**options)
    rank = export_vllm(model, "default", tmp_path / "out")
    assert rank == (32 if options.get("r") == 20 else 16 if "init_lora_weights" in options else 8)
    assert check_vllm(tmp_path / "out", max_lora_rank=rank) == []
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (rank, rank, "none")
    assert config["target_modules"] == ["q_proj", "up_proj"] and not config["rank_pattern"]
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 3 * 2 * 2
    with torch.no_grad():
        expected = model(TOKENS).logits
        there = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "out")).eval()
        torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        here = PeftModel.from_pretrained(llama(), tmp_path / "out")
        torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        assert (expected - llama()(TOKENS).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA is not low-rank"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"]), "merge it into the base"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "trains biases"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]), "aLoRA acts at some positions"),
        (LoraConfig(target_modules=["embed_tokens"]), "embed_tokens: these runtimes adapt linear layers only"),
        (LoraConfig(target_modules=["q_proj"], r=513), "above vLLM's largest, 512"),
        (LoHaConfig(target_modules=["q_proj"]), "LoHa is not low-rank"),
    ],
)
def test_what_they_cannot_take_is_refused(config: PeftConfig, match: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=match):
        export_vllm(get_peft_model(llama(), config), "default", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_advice_works(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False)).eval()
    expected = model(TOKENS).logits
    report = add_as_lora(model, "default", "plain", tolerance=1e-4)
    assert export_vllm(model, "plain", tmp_path) == 8 and max(report.ranks.values()) == 4  # r² of a Hadamard product
    torch.testing.assert_close(
        PeftModel.from_pretrained(llama(), tmp_path)(TOKENS).logits, expected, rtol=1e-4, atol=1e-4
    )
