"""Shapes and capacity of a model's key/value cache."""

import torch
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

from peftcore.prompts.cache import cache_name, cache_of, is_empty, kv_shapes, lacks_prompt, make_room


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
