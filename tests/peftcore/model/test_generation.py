"""`generate` with adapters for each prompt, and with a static cache."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from peftcore import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_each_prompt_is_continued_by_its_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= 10  # so that the adapters choose different tokens
    prompts = torch.arange(9)[None].repeat(3, 1)
    together = model.generate(prompts, adapter_names=["a", "b", None], **OPTIONS)
    for row, name in enumerate(("a", "b")):
        assert torch.equal(together[row], model.generate(prompts[:1], adapter_names=name, **OPTIONS)[0])
    with model.disable_adapter():
        assert torch.equal(together[2], model.generate(prompts[:1], **OPTIONS)[0])
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_a_static_cache_gives_the_tokens_of_a_growing_one(model: Any) -> None:
    prompts = torch.arange(9)[None]
    prompted = get_peft_model(model.unload(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    for one in (prompted, prompted.unload()):
        growing = one.generate(prompts, **OPTIONS)
        assert torch.equal(
            one.generate(prompts, cache_implementation="static", disable_compile=True, **OPTIONS), growing
        )


def test_a_models_own_masks_are_used_unless_a_prompt_is_active(model: Any) -> None:
    class Own(type(model.unload())):
        @staticmethod
        def create_masks_for_generate(**kwargs: Any) -> str:
            return f"own masks of {kwargs['attention_mask']}"

    model.__class__ = Own
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert lora.create_masks_for_generate(attention_mask="1 1") == "own masks of 1 1"
    lora.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    lora.set_adapter("prompt")
    assert lora.create_masks_for_generate(attention_mask="1 1") == "1 1"


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q"], init_lora_weights=False),
        PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2),
    ],
)
def test_an_encoder_decoder_keeps_its_token_ids_if_its_generation_config_names_a_length_alone(
    config: PeftConfig,
) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    tokens: dict[str, Any] = {"decoder_start_token_id": 3, "pad_token_id": 4, "eos_token_id": 1}
    model: Any = get_peft_model(T5ForConditionalGeneration(T5Config(**sizes, **tokens)), config).eval()
    text: dict[str, Any] = {"input_ids": torch.tensor([[5, 6]]), "do_sample": False}
    expected = model.generate(**text, max_length=6)
    model.generation_config = GenerationConfig(max_length=6)  # as `Seq2SeqTrainer` sets it
    assert torch.equal(model.generate(**text), expected)
    assert expected[0, 0] == 3
    assert model.generate(**text, generation_config=GenerationConfig(decoder_start_token_id=2))[0, 0] == 2
    assert model.generate(**text, decoder_start_token_id=0)[0, 0] == 0
