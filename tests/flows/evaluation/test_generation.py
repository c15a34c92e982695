import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from flows.evaluation.generation import generate_answers

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22, 23], [30]]


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


def greedy(model: LlamaForCausalLM, prompt: list[int], steps: int) -> list[int]:
    """By whole forward passes, without padding or cache."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_what_whole_forward_passes_say(model, tokenizer, batch_size: int) -> None:
    found = generate_answers(model, tokenizer, PROMPTS, 6, batch_size)
    for prompt, answer in zip(PROMPTS, found.answers, strict=True):
        ids = greedy(model, prompt, 6)
        assert tokenizer.eos_token_id not in ids
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.tokens == 6 and not answer.has_eos


def test_an_answer_ends_at_the_end_of_the_turn(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = greedy(model, PROMPTS[0], 6)
    monkeypatch.setattr("flows.evaluation.generation.end_token", lambda _: ids[3])
    (answer,) = generate_answers(model, tokenizer, PROMPTS[:1], 6, 1).answers
    assert answer.has_eos and answer.tokens == ids.index(ids[3]) + 1
    assert answer.text == tokenizer.decode(ids[: ids.index(ids[3])], skip_special_tokens=True).strip()


def test_the_head_is_fed_contiguously_and_left_as_it_was(model, tokenizer) -> None:
    model.bfloat16()
    seen: list[bool] = []
    model.lm_head.register_forward_hook(lambda module, given, output: seen.append(given[0].is_contiguous()))
    hooks = len(model.lm_head._forward_pre_hooks)
    generate_answers(model, tokenizer, PROMPTS, 2, 4)
    assert seen and all(seen)
    assert len(model.lm_head._forward_pre_hooks) == hooks


def test_speed_counts_generated_tokens(model, tokenizer) -> None:
    started = time.perf_counter()
    found = generate_answers(model, tokenizer, PROMPTS, 6, 4)
    assert found.tokens_per_second == pytest.approx(24 / found.seconds)
    assert found.seconds <= time.perf_counter() - started
