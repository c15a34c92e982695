"""A tiny Llama with a LoRA whose ranks and scales differ by layer, which vLLM does not read."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model

AWKWARD: dict[str, Any] = {
    "r": 6,
    "lora_alpha": 5,
    "use_rslora": True,
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {"up_proj": 3},
    "alpha_pattern": {"layers.0.*up_proj": 11},
}


def llama() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()


def adapted(**options: Any) -> Any:
    """The model with its LoRA, moved at random; `options` replace those of `AWKWARD`."""
    torch.manual_seed(1)
    model = get_peft_model(llama(), LoraConfig(**{**AWKWARD, **options}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
