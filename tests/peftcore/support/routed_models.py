"""Tiny models with adapters of several methods, and the check that mixed batches equal their rows alone."""

from typing import Any

import torch
from method_example import randomise
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftcore import IA3Config, LoraConfig, OFTConfig, get_peft_model

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


TOKENS = torch.arange(3, 45).view(6, 7)


GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def llama(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)).double()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)).double()


def lora(**options: Any) -> LoraConfig:
    fixed = {"target_modules": "all-linear", "init_lora_weights": False, "inference_mode": True}
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **fixed, **options})


def adapted(base: Any, double: bool = True, **configs: Any) -> Any:
    """A model with these adapters, moved away from their start; in evaluation mode."""
    model = base
    for number, (name, config) in enumerate(configs.items()):
        config.inference_mode = False
        model = get_peft_model(model, config, name) if number == 0 else model
        if number:
            model.add_adapter(name, config)
        for other in model.peft_config:
            model.set_requires_grad(other, other == name)
        randomise(model, 0.2, seed=number)
    for name in configs:
        model.set_requires_grad(name, False)
    return (model.double() if double else model).eval()


def mixture(base: Any) -> Any:
    """A model with two LoRAs, an OFT and an IA3: a, b, c and d."""
    return adapted(
        base,
        a=lora(),
        b=lora(r=2, lora_alpha=8, use_rslora=True, rank_pattern={"0.*": 3}),
        c=OFTConfig(oft_block_size=4, target_modules=_two_layers(base)),
        d=IA3Config(target_modules=_two_layers(base), feedforward_modules=_two_layers(base)[1:]),
    )


def _two_layers(base: Any) -> list[str]:
    return ["c_attn", "c_fc"] if isinstance(base, GPT2LMHeadModel) else ["v_proj", "up_proj"]


def base_output(model: Any, x: Tensor) -> Tensor:
    """The output without any adapter."""
    with model.disable_adapter():
        return model(x)


def assert_rows_as_alone(model: Any, names: list[Any], tokens: Tensor = TOKENS, **arguments: Any) -> None:
    """Each row of a mixed batch equals that row computed alone by its composition; with gradients and without."""
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            mixed = model(tokens[: len(names)], adapter_names=names, **arguments).logits
            for row, name in enumerate(names):
                own = {key: value[row : row + 1] for key, value in arguments.items()}
                with model.route(name):
                    alone = model(tokens[row : row + 1], **own).logits
                torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-10, rtol=0)
