"""A tiny Llama with a LoRA that waits for a data-driven initialisation, and batches for it."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model

TOKENS = torch.tensor([[1, 5, 7, 30, 2, 9]])


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def batches(count: int = 6) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    rows = [torch.randint(0, 40, (4, 9)) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)} for ids in rows]


def lora(start: str, **options: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": start}
    return get_peft_model(llama(), LoraConfig(**{**config, **options}))
