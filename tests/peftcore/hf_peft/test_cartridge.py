"""Prefixes that start at a text's keys and values, and prefixes joined into one."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prompt_models import attach, batch, build, call
from transformers import DynamicCache

from peftcore import (
    CartridgeConfig,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle's own
CAUSAL: dict[str, Any] = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Any] = {"cartridge": CartridgeConfig, "prefix": PrefixTuningConfig}


class Tokenizer:
    """Numbers as a text; with a template, a first token 1."""

    chat_template: str | None = "template"

    def __call__(self, text: str, return_tensors: str, truncation: bool, max_length: int | None) -> dict[str, Any]:
        ids = torch.tensor([[int(word) for word in text.split()]])
        return {"input_ids": ids[:, :max_length] if truncation else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> torch.Tensor:
        assert options.pop("return_tensors") == "pt" and not options.pop("return_dict"), options
        (message,) = messages
        assert message["role"] == "system"
        return torch.cat(
            [torch.ones(1, 1, dtype=torch.long), self(message["content"], "pt", False, None)["input_ids"]], 1
        )


TEXT = " ".join(str(number) for number in range(10, 22))
IDS = torch.arange(10, 22)[None]


def cache_of_text(ids: torch.Tensor = IDS) -> DynamicCache:
    with torch.no_grad():
        return build("llama")(ids, use_cache=True).cache


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prefix_of_a_texts_keys_and_values_is_that_text(kind: str) -> None:
    """A cartridge that starts at a text gives what the model gives after the text, without training."""
    model = get_peft_model(build("llama"), CONFIGS[kind](**CAUSAL)).eval()
    written = initialize_kv_prefix_from_text(model, Tokenizer(), text=TEXT, use_chat_template=False)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), written)
    text = torch.cat([IDS[:, :4].expand(2, -1), batch()], 1)
    with model.disable_adapter():
        expected = call("llama", model, input_ids=text)[:, 4:]
    torch.testing.assert_close(call("llama", model), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_is_pefts() -> None:
    cache = cache_of_text()
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    expected = peft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=3)
    for form in (cache, pairs):
        assert torch.equal(prompt_embeddings_from_past_key_values(form, num_virtual_tokens=3), expected)


def test_the_start_is_pefts() -> None:
    theirs = peft.get_peft_model(build("llama"), peft.CartridgeConfig(**CAUSAL))
    ours = get_peft_model(build("llama"), CartridgeConfig(**CAUSAL)).train()
    for options in ({}, {"use_chat_template": False}, {"max_length": 5}, {"use_chat_template": False, "max_length": 6}):
        expected = peft.initialize_kv_prefix_from_text(theirs, Tokenizer(), text=TEXT, **options)
        written = initialize_kv_prefix_from_text(ours, Tokenizer(), text=TEXT, **options)
        torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-5)
    assert ours.training and ours.model.layers[0].training


def test_a_template_is_used_if_there_is_one() -> None:
    model = get_peft_model(build("llama"), CartridgeConfig(**CAUSAL))
    plain = initialize_kv_prefix_from_text(model, Tokenizer(), text=TEXT, use_chat_template=False)
    assert not torch.equal(initialize_kv_prefix_from_text(model, Tokenizer(), text=TEXT), plain)
    without = Tokenizer()
    without.chat_template = None
    assert torch.equal(initialize_kv_prefix_from_text(model, without, text=TEXT), plain)


def test_the_named_adapter_starts_there_and_the_active_one_stays() -> None:
    model = attach("llama", CartridgeConfig(**CAUSAL))
    model.add_adapter("other", CartridgeConfig(**CAUSAL))
    before = model.get_prompt_embedding_to_save("default")
    written = initialize_kv_prefix_from_past_key_values(model, adapter_name="other", past_key_values=cache_of_text())
    assert torch.equal(model.get_prompt_embedding_to_save("other"), written)
    from_text = initialize_kv_prefix_from_text(
        model, Tokenizer(), text=TEXT, adapter_name="other", use_chat_template=False
    )
    torch.testing.assert_close(from_text, written, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), before)


def test_starts_that_cannot_be() -> None:
    model = get_peft_model(build("llama"), CartridgeConfig(**CAUSAL))
    start, cache = initialize_kv_prefix_from_past_key_values, cache_of_text()
    with pytest.raises(ConfigError, match=r"must have the shape \(4, 64\) of this prefix; got \(3, 64\)"):
        start(model, past_key_values=cache, num_virtual_tokens=3)
    with pytest.raises(ConfigError, match="4 tokens needs as many entries in the cache; it has 2"):
        start(model, past_key_values=cache_of_text(IDS[:, :2]))
    with pytest.raises(ConfigError, match=r"one row and one shape, .* got \[\(2, 2, 6, 8\)\]"):
        start(model, past_key_values=cache_of_text(batch()))
    with pytest.raises(ConfigError, match="past_key_values is empty"):
        start(model, past_key_values=[])
    with pytest.raises(ConfigError, match="layer 0 of past_key_values has no keys and values"):
        start(model, past_key_values=[(None, None)])
    with pytest.raises(ConfigError, match="the text has 3 tokens, and the prefix 4"):
        initialize_kv_prefix_from_text(model, Tokenizer(), text="3 4 5", use_chat_template=False)
    with pytest.raises(ConfigError, match=r"the text has 12 tokens, and the prefix 20"):
        initialize_kv_prefix_from_text(model, Tokenizer(), text=TEXT, num_virtual_tokens=20, use_chat_template=False)
    model = get_peft_model(build("llama"), PromptTuningConfig(**CAUSAL))
    with pytest.raises(ConfigError, match="'default' is of PROMPT_TUNING, which has no prefix"):
        start(model, past_key_values=cache)
    model = get_peft_model(build("llama"), PrefixTuningConfig(**CAUSAL, prefix_projection=True))
    with pytest.raises(ConfigError, match="prefix_projection=False"):
        start(model, past_key_values=cache)
    model = get_peft_model(build("t5"), CartridgeConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is none"):
        initialize_kv_prefix_from_text(model, Tokenizer(), text=TEXT)


# -- joining ---------------------------------------------------------------------------------------------------------


def saved(folder: Path, seed: int, **options: Any) -> Path:
    config = CartridgeConfig(**{**CAUSAL, **options})
    torch.manual_seed(seed)
    get_peft_model(build("llama"), config).save_pretrained(folder)
    return folder


def test_the_tokens_of_joined_adapters_follow_each_other(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "a", 1, num_frozen_tokens=2), saved(tmp_path / "b", 2, num_virtual_tokens=3)]
    compose_cartridge_adapters(paths, output_path=tmp_path / "ours")
    peft.compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    ours, theirs = (PeftModel.from_pretrained(build("llama"), tmp_path / name) for name in ("ours", "theirs"))
    config = ours.peft_config["default"]
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (7, 2)
    assert torch.equal(call("llama", ours), call("llama", theirs))
    there = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    torch.testing.assert_close(call("llama", ours), call("llama", there), rtol=1e-5, atol=1e-5)


def test_adapters_that_cannot_be_joined_leave_the_directory_as_it_was(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", 1)
    out = saved(tmp_path / "out", 2)
    before = (out / "adapter_model.safetensors").read_bytes()
    other = saved(tmp_path / "other", 3, task_type=None)
    lora = tmp_path / "lora"
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(lora)
    for paths, words in (
        ([one], "joins at least two adapters; got 1"),
        ([one, lora], "lora holds an adapter of LORA; only those of CARTRIDGE"),
        ([one, other], "task_type=None, and .*'CAUSAL_LM'"),
    ):
        with pytest.raises(ConfigError, match=words):
            compose_cartridge_adapters(paths, output_path=out)
    with pytest.raises(ConfigError, match="safe_serialization must be True"):
        compose_cartridge_adapters([one, out], output_path=out, safe_serialization=False)
    with pytest.raises(CheckpointError, match="is a file"):
        compose_cartridge_adapters([one, one], output_path=one / "adapter_config.json")
    assert (out / "adapter_model.safetensors").read_bytes() == before
