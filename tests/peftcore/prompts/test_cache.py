"""Shapes and capacity of a model's key/value cache."""

from typing import Any

import pytest
import torch
from method_example import randomise
from prompt_models import DECODER
from tiny_models import tiny
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from peftcore import get_peft_model
from peftcore.prompts.cache import cache_name, cache_of, is_empty, kv_shapes, lacks_prompt, make_room
from peftcore.prompts.loreft import LoReftConfig
from peftcore.prompts.prompt_tuning import PromptTuningConfig


def test_the_decoder_counts_its_own_layers() -> None:
    config = T5Config(d_model=32, d_kv=6, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=64)
    assert kv_shapes(T5ForConditionalGeneration(config)) == [(4, 6)] * 3


def test_layers_that_share_keys_and_values_are_passed_by() -> None:
    assert kv_shapes(tiny("gemma3n_text")) == [(2, 16), (2, 16), None, None]


def test_the_cache_has_the_name_of_the_models_argument() -> None:
    model, cache = LlamaForCausalLM(LlamaConfig(**DECODER)), DynamicCache()
    inputs = {"past_key_values": cache, "cache": None}
    assert cache_of(model, inputs) is cache and inputs == {cache_name(model): cache}
    assert cache_name(nn.Linear(2, 2)) is None and is_empty(None) and is_empty(cache)


def test_a_mask_of_the_text_alone_lacks_the_prompt() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)
    assert lacks_prompt(torch.ones(1, 5), cache, new=1) and not lacks_prompt(torch.ones(1, 6), cache, new=1)


def test_a_static_cache_grows_until_its_memory_is_allocated() -> None:
    cache = StaticCache(config=LlamaConfig(**DECODER), max_cache_len=6)
    make_room(cache, 3, tokens=9)
    assert {layer.max_cache_len for layer in cache.layers} == {9}


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "rwkv"])
@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), LoReftConfig(r=2)],
    ids=["prompt", "reft"],
)
@pytest.mark.filterwarnings("ignore:`attention_mask` was passed")  # RWKV has no use for it
def test_recurrent_states_contain_the_prompt(model_type: str, config: Any) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny(model_type, "cpu").double(), config).eval()
    randomise(model, 0.3)
    text = torch.arange(10, 17)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = text
    lengths = {} if isinstance(config, PromptTuningConfig) else {"prompt_lengths": torch.tensor([7])}
    with torch.no_grad():
        generated = model.generate(text, **options)
        for _ in range(6):
            logits = model(whole, use_cache=False, **lengths).logits
            whole = torch.cat([whole, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, whole)


def test_rows_with_different_prompts_decode_from_recurrent_states() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny("mamba", "cpu").double(), PromptTuningConfig(num_virtual_tokens=3))
    model.add_adapter("five", PromptTuningConfig(num_virtual_tokens=5))
    model.eval().requires_grad_(True)
    for learner in model.prompt_encoder.values():
        randomise(learner, 0.3)
    text = torch.arange(10, 24).view(2, 7)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(text, adapter_names=["default", "five"], **options)
    for row, name in enumerate(("default", "five")):
        with model.route(name):
            assert torch.equal(model.generate(text[row : row + 1], **options), generated[row : row + 1])
