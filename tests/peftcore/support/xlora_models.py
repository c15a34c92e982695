"""Tiny models with X-LoRA, and the trained LoRAs that it mixes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from method_example import randomise
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.xlora import Mixture, XLoraConfig

TARGETS = [["q_proj", "down_proj"], ["q_proj", "embed_tokens"], ["v_proj"]]
"""What the three LoRAs adapt: some layers have one of them, some two."""


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "initializer_range": 0.2,
    "use_cache": False,
}


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def llama() -> Any:
    return build("llama")


def trained_loras(folder: Path, family: str) -> dict[str, str]:
    """{class: directory} of three LoRAs on one base."""
    found = {}
    for n, targets in enumerate(TARGETS):
        config = LoraConfig(r=2 + n, lora_alpha=6, target_modules=targets)
        model = get_peft_model(build(family), config)
        randomise(model, 0.3, seed=n)
        directory = folder / str(n)
        model.save_pretrained(directory)
        found[str(n)] = str(directory)
    return found


def config(loras: dict[str, str], **options: Any) -> XLoraConfig:
    return XLoraConfig(hidden_size=32, adapters=loras, task_type="CAUSAL_LM", **options)


def mixed(loras: dict[str, str], family: str = "llama", **options: Any) -> Any:
    model = get_peft_model(build(family), config(loras, **options)).eval()
    randomise(model, 0.5)
    return model


def mixture(model: nn.Module) -> Mixture:
    shared = adapter_set(model).shared("default")
    assert isinstance(shared, Mixture)
    return shared


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 60, (2, 7))


def lora_alone(loras: dict[str, str], n: int) -> Any:
    return PeftModel.from_pretrained(llama(), loras[str(n)])
