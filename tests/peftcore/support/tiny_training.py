"""A tiny Llama with an adapter, rows for it, and a trainer that says nothing."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from quiet_training import VOCABULARY, quiet_arguments, tiny_llama, without_printing
from transformers import Trainer

from peftcore import AdaLoraConfig, LoraConfig, get_peft_model
from peftcore.train import AdapterTrainer, RightPaddingCollator


def adapted(method: str = "lora", dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """LoRA, or AdaLoRA over eight steps, on all linear layers of a base in `dtype`."""
    base = tiny_llama().to(dtype)
    common: dict[str, Any] = {"target_modules": "all-linear", "lora_alpha": 8, "lora_dropout": dropout, **options}
    if method == "lora":
        return get_peft_model(base, LoraConfig(r=4, **common))
    budget: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 8}
    return get_peft_model(base, AdaLoraConfig(**(budget | common)))


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
    given = {
        name: options.pop(name) for name in ("callbacks", "faults", "data_collator", "eval_dataset") if name in options
    }
    steps: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_nan_inf_filter": False}
    made = AdapterTrainer(
        model=model,
        args=quiet_arguments(folder, **(steps | options)),
        train_dataset=rows(32) if data is None else data,
        **{"eval_dataset": rows(9, seed=1), "data_collator": RightPaddingCollator(0), **given},
    )
    return without_printing(made)


def records(made: AdapterTrainer) -> list[dict[str, Any]]:
    """The training records of a run."""
    return [record for record in made.state.log_history if "loss" in record]


def plain(model: Any, folder: Path, made_by: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """transformers' own trainer (or another class): four steps of four rows, with a column that no model takes."""
    made = made_by(
        model=model,
        args=quiet_arguments(folder, **({"max_steps": 4, "per_device_train_batch_size": 4} | options)),
        train_dataset=rows(16).add_column("note", ["not for the model"] * 16),
        eval_dataset=rows(9, seed=1),
        data_collator=RightPaddingCollator(0),
    )
    return without_printing(made)


SAVING: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "metric_for_best_model": "eval_loss",
}
"""Options that evaluate and save after every step."""
