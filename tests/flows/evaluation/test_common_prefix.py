"""The beginning that all rows share is computed once, and no number depends on it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flows.data.rows import Row
from flows.evaluation import common_prefix, prompt_states
from flows.evaluation.common_prefix import ModelAfterPrefix, model_after_prefix, share_prefix
from flows.evaluation.fidelity import Reference, fidelity
from flows.evaluation.generation import generate_answers
from flows.evaluation.prompt_states import PromptStates
from flows.evaluation.scoring import row_losses
from peftcore import LoraConfig, PrefixTuningConfig, get_peft_model

PREFIX = [(7 * i) % 60 for i in range(24)]
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2))


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


def mpt() -> PreTrainedModel:
    return MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64))


def mistral_with_a_window() -> PreTrainedModel:
    config = MistralConfig(
        **SIZES, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, sliding_window=8
    )
    return MistralForCausalLM(config)


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**SIZES))


def llama_with_lora() -> Any:
    return get_peft_model(llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))


def llama_with_prefix_tuning() -> Any:
    return get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def made(make: Callable[[], Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    if isinstance(model.get_output_embeddings(), torch.nn.Linear):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)  # far from equal probabilities
    return model


def rows(count: int = 9, shared: int = len(PREFIX)) -> list[Row]:
    """Rows whose first `shared` tokens are the same, with 3 to 6 more in the prompt and 4 in the answer."""
    torch.manual_seed(1)
    made: list[Row] = []
    for number in range(count):
        own = torch.randint(60, (len(PREFIX) - shared + 3 + number % 4,)).tolist()
        prompt = [*PREFIX[:shared], (own[0] + number) % 60, *own[1:]]
        answer = torch.randint(60, (4,)).tolist()
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "prompt": len(prompt)})
    return made


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward of a model after a prefix, padding included."""
    seen: list[int] = []
    forward = ModelAfterPrefix.forward

    def counted(self: ModelAfterPrefix, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(input_ids.numel())
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(ModelAfterPrefix, "forward", counted)
    return seen


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """`whole(f)`: what f returns if every text is computed whole."""

    def of(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(common_prefix, "LEAST_ROWS", 1000)
            return function()

    return of


@pytest.mark.parametrize("make", [llama, llama_with_lora, bloom])
def test_losses_are_those_of_whole_rows(make, whole, tokens: list[int]) -> None:
    model, given = made(make), rows()

    def losses() -> Any:
        return row_losses(model, given, 0, 4)

    expected = whole(losses)
    assert not tokens
    found = losses()
    assert sum(tokens) > 0
    assert found.tokens == expected.tokens == [4] * 9
    assert found.means == pytest.approx(expected.means, rel=1e-9)
    assert max(expected.means) - min(expected.means) > 0.1


@pytest.mark.parametrize("make", [llama, llama_with_lora, bloom])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_answers_are_what_whole_forward_passes_say(
    make, batch_size: int, tokens: list[int], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.evaluation.generation.end_token", lambda _: 63)
    model = made(make)
    prompts = [row["input_ids"][: row["prompt"]] for row in rows()]
    found = generate_answers(model, tokenizer, prompts, 5, batch_size).answers
    assert tokens, "the prefix was not used, not even in the check"
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(5):  # without padding or cache
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert len({answer.text for answer in found}) > 4


def test_fidelity_is_that_of_whole_rows(whole, tokens: list[int]) -> None:
    model, other, given = made(llama_with_lora), made(llama), rows()

    def compared() -> Any:
        return fidelity(Reference(model, given, 0, 4), other)

    expected = whole(compared)
    assert not tokens
    found = compared()
    assert len(tokens) == 2 * (1 + 3)  # of each model: the check, and three batches
    assert vars(found) == pytest.approx(vars(expected), rel=1e-5)
    assert found.kl > 0.01


def test_the_prefix_is_read_in_the_state_of_the_model(tokens: list[int]) -> None:
    model, given = made(llama_with_lora), rows()
    adapted = row_losses(model, given, 0, 4)
    with model.disable_adapter():
        base = row_losses(model, given, 0, 4)
    assert tokens
    assert base.means == pytest.approx(row_losses(made(llama), given, 0, 4).means, rel=1e-9)
    assert base.means != pytest.approx(adapted.means, rel=1e-2)


@pytest.mark.parametrize("make", [mamba, mistral_with_a_window, llama_with_prefix_tuning])
def test_a_model_with_another_cache_reads_whole_rows(make, tokens: list[int]) -> None:
    model, given = made(make), rows()
    assert share_prefix(model, given) == (model, given)
    assert len(row_losses(model, given, 0, 4).means) == 9
    assert not tokens


def test_a_model_that_computes_something_else_from_a_cache_reads_whole_rows(tokens: list[int]) -> None:
    """MPT measures distances in places, padding included, so a gap after the prefix changes its answers."""
    model, given = made(mpt), rows()
    assert share_prefix(model, given) == (model, given)
    assert len(tokens) == 1, "the check"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_read_whole_rows(dtype: torch.dtype) -> None:
    assert isinstance(share_prefix(made(llama, dtype), rows())[0], ModelAfterPrefix)


@pytest.mark.parametrize(("tokens_changed", "shares"), [(1, True), (16, False)])
def test_rounding_of_one_token_is_no_reason_either(tokens_changed: int, shares: bool) -> None:
    """With another padding, one token of SmolLM2 in bfloat16 gets logits up to 15 % apart; 16 tokens 6 %."""
    model, given, calls = made(llama, torch.bfloat16), rows(), list[int]()

    def changed(head: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:  # the text after the prefix
            logits = logits.clone()
            logits[:, -tokens_changed:] *= 1.15
        return logits

    model.get_output_embeddings().register_forward_hook(changed)
    assert isinstance(share_prefix(model, given)[0], ModelAfterPrefix) == shares


def test_what_is_taken_apart() -> None:
    model = made(llama)
    after, rests = share_prefix(model, rows())
    assert isinstance(after, ModelAfterPrefix) and after.length == 24
    assert all([*PREFIX, *rest["input_ids"]] == row["input_ids"] for rest, row in zip(rests, rows(), strict=True))
    same = [rows()[0]] * 8  # all is common, but the token before the first label is needed for its logits
    after, rests = share_prefix(model, same)
    assert isinstance(after, ModelAfterPrefix) and after.length == same[0]["prompt"] - 1
    assert rests[0]["labels"][1] != -100 == rests[0]["labels"][0]


def test_the_check_computes_the_logits_of_last_tokens_only() -> None:
    model, positions = made(llama), list[int]()
    model.get_output_embeddings().register_forward_hook(lambda head, given, y: positions.append(y[..., 0].numel()))
    assert isinstance(share_prefix(model, rows())[0], ModelAfterPrefix)
    assert positions == [1, 7, 7], "the prefix, a whole text, and the same text after the prefix, of which 7 follow it"


def test_little_in_common_is_not_taken_apart() -> None:
    model = made(llama)
    assert share_prefix(model, rows(7))[0] is model
    assert share_prefix(model, rows(9, shared=15))[0] is model
    every_token = [row | {"labels": row["input_ids"]} for row in rows()]
    assert share_prefix(model, every_token)[0] is model
    assert model_after_prefix(model, [], -1) is None


def kept(given: list[Row], of: list[int]) -> PromptStates:
    return PromptStates(of, [given[row]["prompt"] for row in of])


@pytest.mark.parametrize("make", [llama, llama_with_lora, bloom])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_answers_continue_from_what_the_losses_have_read(
    make,
    batch_size: int,
    tokens: list[int],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flows.evaluation.generation.end_token", lambda _: 63)
    model, given, of = made(make), rows(), [8, 1, 2, 7, 4, 0, 5, 3]
    prompts = [given[row]["input_ids"][: given[row]["prompt"]] for row in of]
    expected = generate_answers(model, tokenizer, prompts, 5, batch_size).answers
    losses, states = row_losses(model, given, 0, 4), kept(given, of)
    assert row_losses(model, given, 0, 4, prompts=states).means == pytest.approx(losses.means, rel=1e-12)
    assert states.is_complete
    tokens.clear()
    assert generate_answers(model, tokenizer, prompts, 5, batch_size, states=states).answers == expected
    assert not tokens  # not even the common beginning is read again
    assert len({answer.text for answer in expected}) > 4


@pytest.mark.parametrize("reason", ["no room", "a row that was not scored", "no common beginning"])
def test_prompts_are_read_again_if_one_was_not_kept(
    reason: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.evaluation.generation.end_token", lambda _: 63)
    if reason == "no room":
        monkeypatch.setattr(prompt_states, "MAX_KEPT", 10_000)
    model, given, of = made(llama), rows(shared=4 if reason == "no common beginning" else len(PREFIX)), [*range(9)]
    prompts = [given[row]["input_ids"][: given[row]["prompt"]] for row in of]
    states = kept(given, of)
    row_losses(model, given[:8] if reason == "a row that was not scored" else given, 0, 4, prompts=states)
    assert not states.is_complete
    expected = generate_answers(model, tokenizer, prompts, 5, 4).answers
    assert generate_answers(model, tokenizer, prompts, 5, 4, states=states).answers == expected
