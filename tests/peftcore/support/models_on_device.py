"""python models_on_device.py BUILD_FOLDER: adapters and prompts of a Llama, on the second device and the CPU."""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from method_example import examples, randomise
from second_device import DEVICE, Checks, check_close, check_on_device, register
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)

TASK = "CAUSAL_LM"
STARTS = ("gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal", "mica", "loftq")
PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "prompt tuning": lambda: PromptTuningConfig(task_type=TASK, num_virtual_tokens=3),
    "prefix tuning": lambda: PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3),
    "P-tuning": lambda: PromptEncoderConfig(task_type=TASK, num_virtual_tokens=3, encoder_hidden_size=16),
    "multitask": lambda: MultitaskPromptTuningConfig(task_type=TASK, num_virtual_tokens=3, num_tasks=2),
    "cartridge": lambda: CartridgeConfig(task_type=TASK, num_virtual_tokens=3),
    "CPT": lambda: CPTConfig(
        task_type=TASK, cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
    ),
}
WITHOUT_CACHE = ("prefix tuning", "cartridge")
"""Prompts that live in the cache, which activation checkpointing switches off."""


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": TASK, **options})


ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lora,
    "LoRA with dropout": lambda: lora(lora_dropout=0.3),
    "DoRA with dropout": lambda: lora(use_dora=True, lora_dropout=0.2),
    "LoRA with biases": lambda: lora(bias="all"),
    "LoRA of tokens": lambda: lora(trainable_token_indices=[1, 5]),
    "LoRA and a saved head": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "LoRA of embeddings": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "LoRA of parameters": lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "aLoRA": lambda: lora(alora_invocation_tokens=[5, 6]),
    "tokens": lambda: TrainableTokensConfig(token_indices=[1, 2], task_type=TASK),
    **{start: lambda start=start: lora(init_lora_weights=start) for start in STARTS},
    **{
        method: lambda example=example: example.config(
            **{**example.options, "task_type": TASK, "target_modules": ["q_proj", "o_proj"]}
        )
        for method, example in examples().items()
        if not example.whole_model
    },
}
DRAWN = ("LoRA with dropout", "DoRA with dropout", "POLY", "PVERA", "loftq")
"""Cases whose numbers differ between two models: they draw random numbers, or change the base."""


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def check(checks: Checks, name: str, make: Callable[[], PeftConfig]) -> None:
    """Train, generate, save and load, and mix on the device; the CPU's numbers are right."""
    torch.manual_seed(5)
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 64, (3, 7)), "attention_mask": torch.ones(3, 7).long()}
    inputs["attention_mask"][0, :3] = 0
    if name in ("multitask", "POLY"):
        inputs["task_ids"] = torch.zeros(3, dtype=torch.long)
    there = {key: value.to(DEVICE) for key, value in inputs.items()}
    on_cpu = get_peft_model(base(), make())
    randomise(on_cpu, 0.05)
    on_cpu.eval()

    def adapted() -> Any:
        """The same adapter on a base that was on the device before."""
        with tempfile.TemporaryDirectory() as folder:
            on_cpu.save_pretrained(folder)
            return PeftModel.from_pretrained(base().to(DEVICE), folder, is_trainable=name not in PROMPTS)

    def moved() -> None:
        model = copy.deepcopy(on_cpu).to(DEVICE)
        check_on_device(model)
        check_close(model(**there).logits, on_cpu(**inputs).logits, 1e-4)
        model.train()
        model(**there, labels=there["input_ids"]).loss.backward()
        check_on_device(model)

    def made_there() -> None:
        model = get_peft_model(base().to(DEVICE), make())
        model.train()
        if name not in WITHOUT_CACHE:
            model.gradient_checkpointing_enable()
        model(**there, labels=there["input_ids"]).loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
        check_on_device(model)

    def loaded() -> None:
        model = adapted()
        check_on_device(model)
        model.eval()
        if name not in DRAWN:
            check_close(model(**there).logits, on_cpu(**inputs).logits, 1e-4)
        answers = model.generate(**there, max_new_tokens=4, do_sample=False)
        if name not in DRAWN:
            assert torch.equal(answers.cpu(), on_cpu.generate(**inputs, max_new_tokens=4, do_sample=False))
        model.generate(**there, max_new_tokens=3, num_beams=2)

    def mixed() -> None:
        model = get_peft_model(base().to(DEVICE), make())
        model.add_adapter("second", make())
        model.eval()
        names = ["default", "second", "__base__"]
        model(**there, adapter_names=names)
        model.generate(**there, max_new_tokens=3, adapter_names=names)

    def in_half_precision(dtype: torch.dtype) -> None:
        model = get_peft_model(base().to(DEVICE, dtype), make())
        model(**there, labels=there["input_ids"]).loss.backward()
        check_on_device(model)
        model.eval()
        model.generate(**there, max_new_tokens=3)

    checks.step(f"{name}: moved", moved)
    checks.step(f"{name}: made there", made_there)
    checks.step(f"{name}: loaded", loaded)
    checks.step(f"{name}: rows with different adapters", mixed)
    for dtype in (torch.bfloat16, torch.float16):
        checks.step(f"{name}: {dtype}", lambda dtype=dtype: in_half_precision(dtype))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    register(Path(sys.argv[1]))
    checks = Checks("RoutingError")
    for name, make in (ADAPTERS | PROMPTS).items():
        check(checks, name, make)
    checks.finish()
