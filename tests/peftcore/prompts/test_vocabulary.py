"""Initial values from the vocabulary."""

from pathlib import Path

import torch
from prompt_models import build
from transformers import PreTrainedTokenizerBase

from peftcore import get_peft_model
from peftcore.prompts.prompt_tuning import PromptTuningConfig


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
        torch.testing.assert_close(model.prompt_encoder["default"].vectors, expected, rtol=0, atol=0)
        base = model.unload()


def test_starts_at_tokens_of_the_vocabulary() -> None:
    model = get_peft_model(build("gpt2"), PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"))
    table, prompt = model.get_input_embeddings().weight, model.prompt_encoder["default"].vectors
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
    prompt = model.prompt_encoder["default"].vectors.clone()
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "prompt", is_trainable=True)
    torch.testing.assert_close(model.prompt_encoder["default"].vectors, prompt, rtol=0, atol=0)
