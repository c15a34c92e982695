"""A merged GGUF of a transformers folder computes in llama.cpp what the model computes."""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_folders import adapted, byte_level, saved
from gguf_models import CONTEXT, LlamaCpp, furthest, log_probs
from tokenizers import Tokenizer, models, pre_tokenizers

from peftcore.export import check_gguf_base, export_gguf_merged

CLOSE = 1e-4


def numbered() -> Tokenizer:
    """Every token is text of its own, which llama.cpp needs to tell log-probabilities."""
    tokens = ["<s>", "</s>", "t", "1", *(f"t{number}" for number in range(1, 61))]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("t", "1")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama 3's rotary embedding": ("llama", {"rope_parameters": ROPE, "head_dim": 16}),
    "llama, linear rotary embedding": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_file_says_the_same(kind: str, tmp_path: Path) -> None:
    family, options = MODELS[kind]
    saved(tmp_path / "base", family, numbered(), **options)
    check_gguf_base(tmp_path / "base")
    model = adapted(tmp_path / "base")
    file = export_gguf_merged(tmp_path / "base", model, tmp_path / "merged.gguf", dtype="float32")
    there = partial(LlamaCpp(file).log_probs, vocabulary=model.config.vocab_size)
    assert furthest(there, partial(log_probs, model)) < CLOSE
    with model.disable_adapter():
        assert furthest(there, partial(log_probs, model)) > 0.1


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    saved(tmp_path / "base", "mistral", byte_level("gpt-2"), sliding_window=CONTEXT // 2)
    file = export_gguf_merged(tmp_path / "base", adapted(tmp_path / "base"), tmp_path / "merged.gguf")
    assert gguf.GGUFReader(file).fields["llama.context_length"].contents() == CONTEXT // 2
