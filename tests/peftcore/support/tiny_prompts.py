"""Prompts, a reward, and a trainer that samples answers to them, for tests of GRPO."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from quiet_training import quiet_arguments, without_printing
from trl_runs import tokenizer

from peftcore.train import Grpo, GrpoTrainer, Sampling

TEXTS = ("a b c", "a b", "c a", "b", "d e f g", "h", "a a", "e c b")


def prompts(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows of prompts with their text and an id."""
    texts = [TEXTS[number % len(TEXTS)] for number in range(first, first + count)]
    return [
        {"input_ids": tokenizer()(text)["input_ids"], "id": f"row{number}", "prompt": text}
        for number, text in enumerate(texts, first)
    ]


def letters(row: Mapping[str, Any], answer: str) -> float:
    """The number of letters in an answer."""
    return float(len(answer.split()))


def trainer(model: Any, folder: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> GrpoTrainer:
    """A quiet trainer of prompts; options: of GrpoTrainer where it takes them, else training arguments."""
    names = (
        *("rewards", "reward_weights", "objective", "sampling", "end_tokens", "reference", "ref_adapter_name"),
        *("callbacks", "data_collator", "faults", "tokenizer"),
    )
    own: dict[str, Any] = {
        "reference": "base",
        "rewards": {"letters": letters},
        "objective": Grpo(group_size=3, beta=0.1),
        "sampling": Sampling(max_new_tokens=5),
        "tokenizer": tokenizer(),
    }
    own |= {name: options.pop(name) for name in names if name in options}
    steps: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2, "prediction_loss_only": True}
    made = GrpoTrainer(
        model=model,
        args=quiet_arguments(folder, **(steps | options)),
        train_dataset=Dataset.from_list(prompts(8) if rows is None else rows),
        eval_dataset=Dataset.from_list(prompts(3, first=4)),
        **own,
    )
    return without_printing(made)
