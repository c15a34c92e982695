"""Arguments of functions that write and join prefixes of keys and values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from argument_checks import checks
from prompt_models import build

import peftcore
from peftcore import CartridgeConfig, ConfigError, get_peft_model


class Tokenizer:
    """Numbers as a text; a template adds a first token."""

    def __call__(self, text: str, truncation: bool, max_length: int | None, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])[:, :max_length]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> torch.Tensor:
        return self(f"1 {messages[0]['content']}", False, None)["input_ids"]


def model(*names: str) -> Any:
    made = get_peft_model(build("llama"), CartridgeConfig(num_virtual_tokens=3))
    for name in names:
        made.add_adapter(name, CartridgeConfig(num_virtual_tokens=3))
    return made


@checks("prompt_embeddings_from_past_key_values", "past_key_values num_virtual_tokens")
@checks("initialize_kv_prefix_from_past_key_values", "model adapter_name past_key_values num_virtual_tokens")
def test_a_cache() -> None:
    one, other = ([(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)) for _ in range(2)] for _ in range(2))
    layout, start = peftcore.prompt_embeddings_from_past_key_values, peftcore.initialize_kv_prefix_from_past_key_values
    assert torch.equal(layout(one, num_virtual_tokens=3), layout(one, num_virtual_tokens=5)[:3])
    assert not torch.equal(layout(one, num_virtual_tokens=3), layout(other, num_virtual_tokens=3))
    made = model("b")
    values = start(made, past_key_values=one), start(made, past_key_values=other, adapter_name="b")
    for name, value in zip(("default", "b"), values, strict=True):
        assert torch.equal(made.get_prompt_embedding_to_save(name), value)
    with pytest.raises(ConfigError, match="got \\(2, 64\\)"):
        start(made, past_key_values=one, num_virtual_tokens=2)


@checks("initialize_kv_prefix_from_text", "model tokenizer text adapter_name num_virtual_tokens use_chat_template")
@checks("initialize_kv_prefix_from_text", "max_length")
def test_a_text() -> None:
    made, start = model("b"), peftcore.initialize_kv_prefix_from_text
    first = start(made, Tokenizer(), text="5 6 7")
    assert torch.equal(made.get_prompt_embedding_to_save("default"), first)
    assert not torch.equal(start(made, Tokenizer(), text="5 6 7", use_chat_template=False), first)
    assert not torch.equal(start(made, Tokenizer(), text="6 5 7"), first)
    second = start(made, Tokenizer(), text="8 9 7", adapter_name="b")
    assert torch.equal(made.get_prompt_embedding_to_save("b"), second)
    for options in ({"max_length": 2}, {"num_virtual_tokens": 9}):
        with pytest.raises(ConfigError, match="give a longer text"):
            start(made, Tokenizer(), text="5 6 7", **options)


@checks("compose_cartridge_adapters", "adapter_paths output_path safe_serialization")
def test_joining(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "a")
    for paths, name in ((["a", "a"], "two"), (["a", "a", "a"], "three")):
        peftcore.compose_cartridge_adapters([tmp_path / path for path in paths], output_path=tmp_path / name)
        assert peftcore.PeftConfig.from_pretrained(tmp_path / name).num_virtual_tokens == 3 * len(paths)
    with pytest.raises(ConfigError, match="safe_serialization"):
        peftcore.compose_cartridge_adapters([tmp_path / "a"] * 2, output_path=tmp_path, safe_serialization=False)
