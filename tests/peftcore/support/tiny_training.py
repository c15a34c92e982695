"""A tiny Llama with an adapter, rows for it, and a trainer that says nothing."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from peftcore import AdaLoraConfig, LoraConfig, get_peft_model
from peftcore.train import AdapterTrainer, RightPaddingCollator

VOCABULARY = 50


def adapted(method: str = "lora", dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """LoRA, or AdaLoRA over eight steps, on all linear layers of a base in `dtype`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config).to(dtype)
    common: dict[str, Any] = {"target_modules": "all-linear", "lora_alpha": 8, "lora_dropout": dropout, **options}
    if method == "lora":
        return get_peft_model(base, LoraConfig(r=4, **common))
    budget = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 8}
    return get_peft_model(base, AdaLoraConfig(**budget, **common))


def rows(count: int, seed: int = 0) -> Dataset:
    """Rows of 6 to 19 tokens of which a last part is supervised."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for _ in range(count):
        length = int(torch.randint(6, 20, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        start = int(torch.randint(1, length - 1, (), generator=generator))
        made["input_ids"].append(ids.tolist())
        made["labels"].append([-100] * start + ids[start:].tolist())
    return Dataset.from_dict(made)


def trainer(model: Any, folder: Path, data: Dataset | None = None, **options: Any) -> AdapterTrainer:
    """Eight steps of four rows, each logged; `options` are TrainingArguments', the others the trainer's."""
    given = {name: options.pop(name) for name in ("callbacks", "faults", "data_collator") if name in options}
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
    }
    made = AdapterTrainer(
        model=model,
        args=TrainingArguments(**(arguments | options)),
        train_dataset=rows(32) if data is None else data,
        eval_dataset=rows(9, seed=1),
        **{"data_collator": RightPaddingCollator(0), **given},
    )
    made.callback_handler.callbacks = [  # no printing
        callback for callback in made.callback_handler.callbacks if type(callback).__name__ != "PrinterCallback"
    ]
    return made


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def records(made: AdapterTrainer) -> list[dict[str, Any]]:
    """The training records of a run."""
    return [record for record in made.state.log_history if "loss" in record]
