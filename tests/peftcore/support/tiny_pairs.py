"""Pairs of answers, a tiny Llama with an adapter, and a trainer's arguments, for tests of preference objectives."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from quiet_training import VOCABULARY, quiet_arguments, tiny_llama, without_printing
from torch import Tensor
from torch.nn import functional as F

from peftcore import AdaLoraConfig, LoraConfig, get_peft_model
from peftcore.train import PreferenceCollator, PreferenceTrainer


def adapted(method: str = "lora", **options: Any) -> Any:
    """A Llama with one adapter on all linear layers that is not at its start, so that model and reference differ."""
    common: dict[str, Any] = {"target_modules": "all-linear", "lora_alpha": 8, "init_lora_weights": False}
    config = LoraConfig(r=4, **(common | options))
    if method == "adalora":
        budget: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 6}
        config = AdaLoraConfig(**(common | budget | options))
    return get_peft_model(tiny_llama(), config)


def pairs(count: int, weights: list[float] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of pairs behind a common prompt; answers of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for _ in range(count):
        prompt = tokens(2, 6)
        row: dict[str, Any] = {"prompt_length": len(prompt)}
        for side in ("chosen", "rejected"):
            answer = tokens(1, 8)
            row |= {f"{side}_input_ids": prompt + answer, f"{side}_labels": [-100] * len(prompt) + answer}
        rows.append(row)
    return rows if weights is None else [row | {"weight": w} for row, w in zip(rows, weights, strict=True)]


def log_prob(model: Any, ids: list[int], labels: list[int]) -> Tensor:
    """Summed log-probability of the labelled tokens of one row, from all its logits."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return -F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")


def trainer(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> PreferenceTrainer:
    """A quiet trainer of pairs; options: of PreferenceTrainer where it takes them, else training arguments.

    The reference is the base, which `adapted` differs from, if the options do not say otherwise.
    """
    names = (
        "objective",
        "reference",
        "ref_adapter_name",
        "precompute_reference",
        "callbacks",
        "data_collator",
        "faults",
    )
    own = {"reference": "base"} | {name: options.pop(name) for name in names if name in options}
    steps: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2, "prediction_loss_only": True}
    made = PreferenceTrainer(
        model=model,
        args=quiet_arguments(folder, **(steps | options)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(pairs(5, seed=1)),
        **({"data_collator": PreferenceCollator(0)} | own),
    )
    return without_printing(made)
