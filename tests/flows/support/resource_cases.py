"""Configurations, parameters and batches for tests of resource estimation."""

from typing import Any

from transformers import LlamaConfig

from flows.params import Params
from flows.resources.batches import BatchSize, RowSize

GIB = 2**30
LINEARS_7B = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def llama_7b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def params(**sections: dict[str, Any]) -> Params:
    given: dict[str, dict[str, Any]] = {
        "method": {"r": 4},
        "train": {"batch_size": 4, "gradient_accumulation": 2},
        "tracking": {"mode": "disabled"},
        "quantization": {"compute_dtype": "bfloat16"},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return Params.model_validate(given)


def batch(rows: int, tokens: int, supervised: int = 8) -> BatchSize:
    return BatchSize((RowSize(tokens, supervised),) * rows, True)
