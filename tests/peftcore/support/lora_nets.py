"""Small layers and models that LoRA's tests share."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peftcore import LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set


def adapter(net: Any, path: str = "0") -> Any:
    return adapter_set(net).adapters("default")[path]


def lora(net: nn.Module, **options: Any) -> Any:
    return get_peft_model(net, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0"], **options}))


LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(3, 6)),
    "conv1d of gpt2": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 6)),
    "conv": (lambda: nn.Conv2d(4, 5, 3, padding=1), lambda: torch.randn(2, 4, 6, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.randint(0, 9, (3, 4))),
}


def net_and_input(layer: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs = LAYERS[layer]
    net, x = nn.Sequential(make()).double(), inputs()
    return net, x.double() if x.is_floating_point() else x


TOKENS = torch.tensor([[1, 5, 7, 30, 2, 9]])


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, **heads, "eos_token_id": None, "pad_token_id": 0, **options})
    ).eval()
