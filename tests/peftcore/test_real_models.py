"""The real MiniLM encoder and, where the pipeline has fetched it, the real SmolLM2: HF `peft` agrees on both."""

import warnings
from pathlib import Path
from typing import Any

import minilm
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from peftcore import LoraConfig, PeftModel, get_peft_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls

SMOLLM2 = Path(__file__).parents[2] / "artifacts" / "base"


def agree(load: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(10, 1000, (2, 12))
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    ours = get_peft_model(load(), config).eval()
    ours.save_pretrained(tmp_path)
    there = peft.PeftModel.from_pretrained(load(), tmp_path).eval()
    here = PeftModel.from_pretrained(load(), tmp_path)
    with torch.no_grad():
        expected, base = there(tokens)[0], load().eval()(tokens)[0]
        torch.testing.assert_close(ours(tokens)[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(here(tokens)[0], expected, rtol=1e-5, atol=1e-5)
        assert (expected - base).abs().max() > 0.1
        ours.merge_adapter()
        torch.testing.assert_close(ours(tokens)[0], expected, rtol=1e-3, atol=1e-3)
        ours.unmerge_adapter()
        with ours.disable_adapter():
            assert torch.equal(ours(tokens)[0], base)


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    model = minilm.fetched(tmp_path)
    agree(lambda: AutoModel.from_pretrained(model, dtype=torch.float32), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="SmolLM2 is not fetched; run `make run` first")
def test_smollm2(tmp_path: Path) -> None:
    # in float32 thirty blocks of rounding differ by more than the tolerance on some processors
    agree(lambda: AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float64), tmp_path)
