"""A tiny Llama with adapters moved at random, for tests that convert adapters to LoRA."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
TOKENS = torch.arange(1, 25).view(2, 12)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


OTHERS: dict[str, tuple[PeftConfig, int]] = {
    "dora": (LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=False), 16),
    "loha": (LoHaConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False), 4),
    "lokr": (LoKrConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False), 16),
    "oft": (OFTConfig(target_modules=["q_proj", "up_proj"], oft_block_size=4, r=0), 16),
    "ia3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), 16),
    "tokens": (LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[3, 5]), 2),
    "embedding": (LoHaConfig(target_modules=["embed_tokens", "q_proj"], r=2, init_weights=False), 4),
}
"""{method: (configuration, rank at which two factors equal its change)}"""


def random_adapter(config: PeftConfig, base: Any = None) -> Any:
    """A model with this adapter, moved away from its start; in evaluation mode."""
    model = get_peft_model(base or llama(), config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model
