"""Adapters of HF PEFT whose `modules_to_save` matched the ends of module names."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def test_hf_pefts_adapter_with_all_norms_gives_hf_pefts_logits(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    ours = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert sum("modules_to_save" in name for name, _ in ours.named_parameters()) == 5  # two in each layer, and the last
    again = tmp_path / "again"
    ours.save_pretrained(again)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(llama(), again)(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), again)(ids).logits, theirs(ids).logits)


def test_two_of_hf_pefts_adapters_with_all_norms_load_onto_one_model(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path).eval()
    ours.load_adapter(tmp_path, "second")
    ours.set_adapter("second")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits)


def test_a_saved_name_matches_the_same_modules_in_hf_peft(tmp_path: Path) -> None:
    config = LoraConfig(
        target_modules=["q_proj"],
        modules_to_save=["norm", "embed_tokens"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    ours = get_peft_model(llama(), config)
    torch.nn.init.normal_(ours.get_submodule("model.norm").copies["default"].weight)
    ours.eval().save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert set(theirs.peft_config["default"].modules_to_save) == {"model.norm", "embed_tokens"}
    ids = torch.arange(12)[None]
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(ids).logits, ours(ids).logits)
    assert ours.peft_config["default"].modules_to_save == ["norm", "embed_tokens"]
