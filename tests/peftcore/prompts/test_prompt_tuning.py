"""Prompt tuning: learned embeddings before the text."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prompt_models import FAMILIES, attach, batch, both_ways, build
from transformers import PreTrainedTokenizerBase

from peftcore import get_peft_model
from peftcore.errors import ConfigError
from peftcore.prompts.prompt_tuning import PromptTuningConfig


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": FAMILIES[family][1]}
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0  # right-padded, where both libraries put the prompt in front
    if family == "llama-cls":  # PEFT reads the padding's answer there
        mask[:] = 1
    both_ways(family, peft.PromptTuningConfig(**options), PromptTuningConfig(**options), tmp_path, attention_mask=mask)


def test_the_model_reads_the_prompt_then_the_text() -> None:
    model = attach("llama", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    prompt = model.peftcore_prompts["default"].embedding
    text = model.get_input_embeddings()(batch())
    with torch.no_grad():
        out = model(batch()).logits
        with model.disable_adapter():
            expected = model(inputs_embeds=torch.cat([prompt.expand(2, 3, 32), text], 1)).logits
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_starts_at_a_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    base = build("llama")
    base.resize_token_embeddings(len(tokenizer))
    table = base.get_input_embeddings().weight
    tokens = tokenizer("ab")["input_ids"]
    for count in (1, 2, 5):  # cut, whole, repeated
        config = PromptTuningConfig(
            num_virtual_tokens=count,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="ab",
            tokenizer_name_or_path=str(tmp_path),
        )
        model = get_peft_model(base, config)
        expected = table[torch.tensor((tokens * 3)[:count])]
        torch.testing.assert_close(model.peftcore_prompts["default"].embedding, expected, rtol=0, atol=0)
        base = model.unload()


def test_starts_at_tokens_of_the_vocabulary() -> None:
    model = get_peft_model(build("gpt2"), PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"))
    table, prompt = model.get_input_embeddings().weight, model.peftcore_prompts["default"].embedding
    assert (prompt.unsqueeze(1) == table).all(-1).any(1).all()


def test_a_saved_prompt_needs_no_tokenizer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    base = build("llama")
    base.resize_token_embeddings(len(tokenizer))
    config = PromptTuningConfig(
        num_virtual_tokens=3,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="ab",
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "prompt")
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    prompt = model.peftcore_prompts["default"].embedding.clone()
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "prompt", is_trainable=True)
    torch.testing.assert_close(model.peftcore_prompts["default"].embedding, prompt, rtol=0, atol=0)


def test_half_precision_bases_keep_a_float32_prompt() -> None:
    model = get_peft_model(build("llama").bfloat16(), PromptTuningConfig(num_virtual_tokens=3))
    assert model.peftcore_prompts["default"].embedding.dtype == torch.float32
    assert model(batch()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "num_virtual_tokens must be a positive integer"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer"),
        ({"num_virtual_tokens": 2, "prompt_tuning_init": "WORDS"}, "must be one of"),
        ({"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}, "needs tokenizer_name_or_path"),
        (
            {"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"},
            "needs prompt_tuning_init_text",
        ),
        ({"num_virtual_tokens": 2, "tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs are for"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PromptTuningConfig(**options)


def test_models_that_cannot_have_one() -> None:
    with pytest.raises(ConfigError, match="no token embeddings"):
        get_peft_model(torch.nn.Linear(2, 2), PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="token_dim=16, but the model's embeddings have width 32"):
        get_peft_model(build("llama"), PromptTuningConfig(num_virtual_tokens=2, token_dim=16))
