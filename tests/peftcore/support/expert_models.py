"""Tiny models with experts."""

from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

IDS = torch.tensor([[1, 2, 3, 9]])
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=12, num_local_experts=3)).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 12, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 8}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts=3, num_experts_per_tok=2)).eval()
