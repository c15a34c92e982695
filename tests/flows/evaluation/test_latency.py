"""One request at a time: what an adapter costs is told apart from what the base does, and the prompt from the rest."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flows.evaluation.latency import NEW_TOKENS, measure_latency
from peftcore import LoraConfig, get_peft_model


def test_what_is_slow_is_what_is_told(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config).eval(), LoraConfig(r=2, target_modules=["q_proj"]))
    asleep: list[int] = []
    adapted, switch = [True], model.disable_adapter

    @contextmanager
    def disabled() -> Iterator[None]:
        with switch():
            adapted.clear()
            yield
        adapted.append(True)

    def sleep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if adapted:
            asleep.append(inputs[0].shape[1])
            time.sleep(0.1 if asleep[-1] > 1 else 0.02)  # seconds

    monkeypatch.setattr(model, "disable_adapter", disabled)
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(sleep)
    found = measure_latency(model, tokenizer, [[5, 6, 7], [8, 9, 10, 11]])
    base, adapter = found["base"], found["adapter"]
    assert adapter["token_ms"] >= 20 and adapter["first_token_ms"] >= 100  # which the hook sleeps
    assert min(base.values()) > 0
    # a warm-up and two requests, each for as many tokens, whatever the model would like to say
    assert len(asleep) == 3 * NEW_TOKENS
    assert [tokens for tokens in asleep if tokens > 1] == [3, 3, 4]


def test_a_model_that_would_end_at_once_is_timed_all_the_same(tokenizer) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).eval()
    head = base.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    head.bias.data[tokenizer.eos_token_id] = 1e4
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert measure_latency(model, tokenizer, [[5, 6, 7]])["adapter"]["token_ms"] > 0
