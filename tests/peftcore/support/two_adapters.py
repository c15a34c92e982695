"""A tiny Llama with two LoRAs."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model


def two_adapters() -> Any:
    """Return a model with the adapters a, which is active, and b."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    return model.eval()


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    return model(torch.arange(9)[None], **options).logits
