"""A tiny model whose adapter changes its losses and answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from flows.params import Params
from peftcore import LoraConfig, get_peft_model


@pytest.fixture
def adapted(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A PeftModel of one layer in float64, with an adapter so strong that it answers otherwise than its base."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).double().eval()
    options = LoraConfig(r=2, lora_alpha=256, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(base, options)


@pytest.fixture
def answering() -> Callable[..., Params]:
    """`answering(train={...})`: parameters that ask two rows for answers of three tokens."""

    def make(**sections: dict[str, Any]) -> Params:
        evaluate = {"rows": 8, "batch_size": 2, "generate_rows": 2, "max_new_tokens": 3, "samples": 1}
        return Params.model_validate({"evaluate": evaluate} | sections)

    return make
