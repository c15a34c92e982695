"""aLoRA: the positions at which the adapter acts, parity with HF PEFT, and generation."""

from typing import Any

import peft
import pytest
import routed_models
import torch
from lora_nets import llama
from method_example import randomise
from routed_models import TOKENS, adapted, assert_rows_as_alone, lora
from torch import nn

from peftcore import ConfigError, LoraConfig, MergeError, get_peft_model
from peftcore.composition import Stack
from peftcore.errors import RoutingError

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def alora() -> Any:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 8])
    model = get_peft_model(llama(), config)
    randomise(model, 0.5)
    return model


INVOKED = torch.tensor([[3, 7, 8, 5, 7, 8, 4], [3, 4, 5, 6, 7, 9, 8]])


def test_alora_acts_from_the_last_invocation_on() -> None:
    model, base = alora(), llama()(INVOKED).logits
    logits = model(INVOKED).logits
    assert torch.equal(logits[0, :4], base[0, :4])  # the first invocation is not the last
    assert not torch.allclose(logits[0, 4:], base[0, 4:])
    torch.testing.assert_close(logits[1], base[1])  # no invocation: the base
    with pytest.raises(MergeError, match="some positions"):
        model.merge_adapter()


def test_alora_parity(tmp_path: Any) -> None:
    model = alora()
    model.save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert isinstance(hf, peft.PeftModelForCausalLM) or hf.peft_config["default"].task_type is None
    offsets = [3, None]
    theirs = hf(input_ids=INVOKED, alora_offsets=offsets).logits
    torch.testing.assert_close(model(INVOKED).logits, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(INVOKED, alora_offsets=offsets).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_alora_generates_what_repeated_forwards_give(beams: int) -> None:
    model, prompt = alora(), INVOKED
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    uncached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    if beams == 1:
        assert torch.equal(cached[0], uncached[0])
    base = llama().generate(prompt[1:], attention_mask=torch.ones_like(prompt[1:]), **options)
    assert torch.equal(cached[1], base[0])
    given = model.generate(prompt, attention_mask=torch.ones_like(prompt), alora_offsets=[3, None], **options)
    assert torch.equal(given, cached)


def test_alora_is_invoked_behind_a_cache_of_the_base_whatever_was_called_before() -> None:
    model, start = alora(), INVOKED[:1, :4]
    expected = model(INVOKED[:1]).logits[:, 4:]
    for earlier in (INVOKED[1:], INVOKED[:1], INVOKED):  # not invoked, invoked elsewhere, another number of rows
        model(earlier)
        with model.disable_adapter():
            cache = model(start, use_cache=True).past_key_values
        found = model(INVOKED[:1, 4:], past_key_values=cache).logits
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("option", ["prefill_chunk_size", "prompt_lookup_num_tokens"])
def test_alora_takes_no_prompt_in_parts_and_no_guessed_tokens(option: str) -> None:
    model = alora()
    options: dict[str, Any] = {option: 3, "max_new_tokens": 2}
    with pytest.raises(ConfigError, match=option):
        model.generate(INVOKED[:1], **options)
    with model.disable_adapter():
        model.generate(INVOKED[:1], **options)


def test_alora_acts_nowhere_in_embeddings_and_says_so() -> None:
    model, embeddings = alora(), llama().get_input_embeddings()(INVOKED)
    invoked = model(INVOKED).logits
    with pytest.warns(UserWarning, match="it has no input_ids, in which the invocation .7, 8. could be found"):
        assert torch.equal(model(inputs_embeds=embeddings).logits, llama()(INVOKED).logits)
    assert torch.equal(model(inputs_embeds=embeddings, alora_offsets=[3, None]).logits, invoked)


def test_embeddings_stay_the_base_model_while_text_is_generated() -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    embeddings = llama().get_input_embeddings()(INVOKED)
    expected = llama().generate(inputs_embeds=embeddings, **options)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], alora_invocation_tokens=expected.unique().tolist()[:1])
    model = get_peft_model(llama(), config)
    randomise(model, 5.0)
    with pytest.warns(UserWarning, match="acts nowhere"):
        assert torch.equal(model.generate(inputs_embeds=embeddings, **options), expected)


def test_a_call_without_named_tokens_does_not_use_the_positions_of_the_call_before() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["proj"], alora_invocation_tokens=[1]))
    randomise(model, 0.5)
    x = torch.randn(2, 4, 3)
    assert not torch.equal(model(x, alora_offsets=[1, 4]), model.proj.base_layer(x))
    with pytest.warns(UserWarning, match="has no input_ids"):
        assert torch.equal(model(x), model.proj.base_layer(x))


def test_alora_acts_where_its_row_was_invoked() -> None:
    model = adapted(routed_models.llama(), a=lora(alora_invocation_tokens=[20, 21]), b=lora())
    tokens = TOKENS.clone()
    tokens[0, 2:4] = tokens[3, 4:6] = torch.tensor([20, 21])
    assert_rows_as_alone(model, ["a", "b", None, "a", "a", "b"], tokens)
    with pytest.raises(RoutingError, match="only one composition of a batch can have it"):
        model(tokens, adapter_names=["a", Stack("a", "b"), None, None, None, None])
