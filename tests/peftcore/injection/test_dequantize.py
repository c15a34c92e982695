"""Plain layers in place of quantised ones."""

from typing import Any

import pytest
import torch
from method_example import randomise
from quantised_layers import quantised
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, MergeError, TargetError, dequantize_base, get_peft_model

LORA = LoraConfig(r=2, target_modules=["0"])


def test_adapters_stay_and_merge_without_rounding_to_few_bits() -> None:
    shared = quantised("nf4")
    net: Any = nn.Sequential(shared, nn.Linear(32, 64), shared)
    model = get_peft_model(net, LORA)
    randomise(model, 0.3)
    x = torch.randn(3, 64)
    adapted = model(x)
    assert dequantize_base(model) is model
    assert type(model[0].base_layer) is nn.Linear and not model[0].base_layer.weight.requires_grad
    torch.testing.assert_close(model(x), adapted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), adapted)


@pytest.mark.parametrize("kind, default", [("nf4", torch.float32), ("int8", torch.float32)])
def test_the_dtype_is_the_layers_own_or_the_one_asked_for(kind: str, default: torch.dtype) -> None:
    assert dequantize_base(nn.Sequential(quantised(kind)))[0].weight.dtype == default
    plain = dequantize_base(nn.Sequential(quantised(kind).eval()), torch.bfloat16)[0]
    assert plain.weight.dtype == plain.bias.dtype == torch.bfloat16 and not plain.training


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_the_default_dtype_is_that_of_the_layers_around(kind: str, has_adapter: bool) -> None:
    around = nn.Linear(64, 64).bfloat16()
    model: Any = nn.Sequential(around, quantised(kind))  # the quantised layer multiplies in float32
    if has_adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = model(x)
    plain = dequantize_base(model)(x)
    assert plain.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(plain, expected, rtol=0.1, atol=0.1)


def test_merged_adapters_and_plain_models_are_refused() -> None:
    model: Any = get_peft_model(nn.Sequential(quantised("nf4")), LORA)
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"\['default'\] are merged into the quantised layer 0; call unmerge_adapter"):
        dequantize_base(model)
    assert model[0].base.quantized
    with pytest.raises(TargetError, match="Sequential has no quantised layer"):
        dequantize_base(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_of_transformers_is_saved_as_a_plain_one(tmp_path: Any) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    options: Any = {"quantization_config": storage, "device_map": {"": "cpu"}, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens).logits
    dequantize_base(model).save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(again(tokens).logits, expected)
