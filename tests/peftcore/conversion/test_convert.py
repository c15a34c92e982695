"""Any mergeable adapter becomes a plain LoRA of its model, or a directory that HF PEFT reads."""

import warnings
from pathlib import Path

import pytest
import torch
from conversion_models import OTHERS, TOKENS, llama, random_adapter

from peftcore import (
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    conversion,
)
from peftcore.conversion import convert_to_lora, save_as_lora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft


@pytest.mark.parametrize("method", OTHERS)
def test_any_mergeable_method_becomes_a_lora_of_its_model(method: str) -> None:
    config, rank = OTHERS[method]
    model = random_adapter(config)
    expected = model(TOKENS).logits
    report = convert_to_lora(model, "default", "plain", rank=rank)
    assert report.error < 1e-5 and max(report.errors.values()) < 1e-5 and max(report.ranks.values()) <= rank
    assert torch.equal(model(TOKENS).logits, expected)  # the new one does not act yet
    model.set_adapter("plain")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (model(TOKENS).logits - expected).abs().max() > 3e-4


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"up_proj": 3}),
        LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights="pissa", r=3, alpha_pattern={"q_proj": 2}),
        LoraConfig(target_modules=["embed_tokens", "lm_head"], r=3),
        VeraConfig(target_modules=["q_proj", "down_proj"], r=5),
    ],
    ids=["rslora", "pissa", "embedding", "vera"],
)
def test_low_rank_methods_convert_exactly_and_hf_peft_reads_them(config: PeftConfig, tmp_path: Path) -> None:
    model = random_adapter(config)
    report = save_as_lora(model, tmp_path)
    assert report.error == 0 and set(report.errors.values()) == {0}
    with torch.no_grad():
        expected = model(TOKENS).logits
        here = PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
        there = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
        torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)


def test_saved_modules_come_along_in_the_model() -> None:
    model = random_adapter(LoHaConfig(target_modules=["q_proj"], r=2, modules_to_save=["norm"], init_weights=False))
    expected = model(TOKENS).logits
    convert_to_lora(model, "default", "plain", tolerance=1e-6)
    model.set_adapter("plain")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_old_name_of_the_report_warns() -> None:
    with pytest.warns(DeprecationWarning, match="now called LowRankReport"):
        assert conversion.Conversion is conversion.LowRankReport
