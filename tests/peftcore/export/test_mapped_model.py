"""A mapped model with dequantised weights equals the base that training in 4 bits saw."""

from pathlib import Path

import pytest
import torch
from streamed_models import saved, tensors_of, trained
from transformers import (
    AutoModelForCausalLM,
)

from peftcore import (
    LoraConfig,
    PeftModel,
)
from peftcore.export import merge_streaming


@pytest.mark.parametrize("double_quant", [False, True])
def test_into_what_training_in_4_bits_saw(double_quant: bool, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    base = saved(tmp_path / "base")
    adapter = trained(base, LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True), tmp_path / "adapter")
    merge_streaming(base, adapter, tmp_path / "out", storage="nf4", double_quant=double_quant)
    storage = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=storage, dtype=torch.bfloat16)
    expected = PeftModel.from_pretrained(quantised.dequantize(torch.bfloat16), adapter).merge_and_unload().state_dict()
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert {file.name for file in (tmp_path / "out").iterdir()}.isdisjoint({"dequantised.safetensors"})
